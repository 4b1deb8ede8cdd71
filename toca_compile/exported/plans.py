"""Plans: what a policy plans where a size is open. A plan is host data that follows from the sites, so the policy is
asked for each size with the sites as they are there, and no model is traced for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from toca_compile.compiler.check_plan import check_plan
from toca_compile.compiler.lay_out import Asked
from toca_compile.errors import ExportError, PolicyError
from toca_compile.exported.fit import Fit, Unlike
from toca_compile.ir.actions import Action, Compute, Selecting
from toca_compile.ir.plan import Plan
from toca_compile.ir.state import Number as Kind
from toca_compile.ir.table import Number, Row, Size, Step, Table, Told, at
from toca_compile.ir.types import Site, TokenAxis

if TYPE_CHECKING:
    from toca_compile.exported.write import Traced


@dataclass(frozen=True)
class _Planned:
    """A plan for sites of one size."""

    sites: tuple[Site, ...]
    plan: Plan

    def computed(self, step: int, site: int, *, skips: bool) -> int:
        """How many tokens a site computes in a step. ``skips``: whether it skips what it may."""
        action = self.plan.steps[step].sites[site]
        return (action if skips or not action.by_blocks else Compute()).computed(self.sites[site])


@dataclass(frozen=True)
class _Axis:
    """An axis where its size is open. ``rest``: height, width, offset and frames, where they follow from the size."""

    like: TokenAxis
    size: Size
    rest: tuple[Size, ...] = ()

    def at(self, n: int) -> TokenAxis:
        """At one size. A policy that asks for a grid that is not known is found out at the points."""
        height, width, offset, frames = (at(one, n) for one in self.rest) if self.rest else (0, 0, 0, 1)
        grid = (height, width) if self.rest else None
        return replace(self.like, size=at(self.size, n), grid=grid, offset=offset, frames=frames)


class Plans:
    """The steps of a table for every size of a range.

    Args:
        several: the model at the range's points.

    Attributes:
        steps, rows: of the table.
        sized: the numbers that follow from the size, by name: one for each size.

    Raises:
        Unlike: the plans differ in more than how many tokens are computed.
        ExportError: the policy has none for some size.
    """

    def __init__(self, several: Sequence["Traced"], fit: Fit) -> None:
        self.fit, self.several, self.last = fit, several, several[-1]
        programs = [one.recorder.program for one in several]
        fit.same([[(s.name, s.kind) for s in p.sites] for p in programs], "which sites there are")
        self.axes = [
            self._axis([site.axis for site in sites]) for sites in zip(*(p.sites for p in programs), strict=True)
        ]
        self._check_grid()
        made: dict[tuple[TokenAxis, ...], _Planned] = {}
        self.all: list[_Planned] = []
        for n in fit.what.values:
            axes = tuple(axis.at(n) for axis in self.axes)
            if axes not in made:
                made[axes] = self._planned(n, axes)
            self.all.append(made[axes])
        self.sized: dict[str, tuple[int, ...]] = {}
        self._names: dict[tuple[int, ...], str] = {}
        self._rows: dict[tuple[object, ...], int] = {}
        self._told: list[Row] = []
        tables = [one.table for one in several]
        fit.same([len(table.steps) for table in tables], "how many steps there are")
        alike = zip(*(table.steps for table in tables), strict=True)
        self.steps = tuple(self._step(i, own, tables) for i, own in enumerate(alike))
        self.rows = tuple(self._told)

    def _axis(self, several: Sequence[TokenAxis]) -> "_Axis":
        size, last = self.fit.size([axis.size for axis in several], "how many tokens a site has"), several[-1]
        tables = [one.tables for one in self.several]
        # Tables of positions were repeated and cut off: at another size they are the picture that the caller has there.
        told = any(t.grid == (x.height, x.width) for t, x in product(several, tables[-1])) and len(set(tables)) > 1
        if last.grid is None or told or any(axis.grid is None for axis in several):
            return _Axis(last, size)
        try:
            columns = zip(*((*(axis.grid or ()), axis.offset, axis.frames) for axis in several), strict=True)
            return _Axis(last, size, tuple(self.fit.size(column, "a grid") for column in columns))
        except Unlike:
            return _Axis(last, size)

    def _check_grid(self) -> None:
        """That the policy does not ask for a grid that no size tells."""
        plan = self.last.recorder.schedule.plan
        for site, axis in zip(self.last.recorder.program.sites, self.axes, strict=True):
            doubts = [plan.selector.doubts([replace(site, axis=a)]) for a in (axis.at(self.fit.what.most), site.axis)]
            if plan.selects(site.index) and set(doubts[0]) - set(doubts[1]):
                raise Unlike("the grid in which tokens lie, which the policy asks for (bonus=0 does without),")

    def _planned(self, n: int, axes: Sequence[TokenAxis]) -> _Planned:
        last, what = self.last, self.fit.what
        program = last.recorder.program
        sites = tuple(replace(site, axis=axis) for site, axis in zip(program.sites, axes, strict=True))
        try:
            plan = check_plan(last.policy, replace(program, sites=sites), lambda told: None).plan
        except PolicyError as error:
            raise ExportError(
                f"{last.about.model} cannot be exported for {what.name} from {what.least} to {what.most}: where it is "
                f"{n}, {error}"
            ) from error
        self._compare(n, plan)
        return _Planned(sites, plan)

    def _compare(self, n: int, plan: Plan) -> None:
        """That a plan says what the one that was laid out says, but for how many tokens are computed."""
        own = self.last.recorder.schedule.plan
        if replace(plan, steps=()) != replace(own, steps=()) or len(plan.steps) != len(own.steps):
            raise Unlike("the plan")
        good: set[tuple[int, int]] = set()  # plans say the same object many times
        for i, (step, wanted) in enumerate(zip(plan.steps, own.steps, strict=True)):
            for site, a, b in zip(self.last.recorder.program.sites, step.sites, wanted.sites, strict=True):
                if (id(a), id(b)) not in good and _plain(a) != _plain(b):
                    raise Unlike(
                        f"what {site.name} does in step {i} ({a} where it is {n}, {b} where it is {self.fit.what.most})"
                    )
                good.add((id(a), id(b)))

    def _step(self, index: int, several: Sequence[Step], tables: Sequence[Table], *, skips: bool = True) -> Step:
        rows = [table.rows[step.row] for table, step in zip(tables, several, strict=True)]
        last = rows[-1]
        self.fit.same([replace(row, tokens={}) for row in rows], f"what step {index} calls")
        self.fit.same([list(row.tokens) for row in rows], f"what step {index} computes")
        tokens = {}
        for i, site in enumerate(self.all[-1].sites):
            tokens[site.name] = self._number([row.tokens[site.name] for row in rows], index, i, skips=skips)
        numbers = []
        for which, call in enumerate(last.calls):
            own = [step.numbers[which] for step in several]
            asked = zip(self.last.laid.asked[call], zip(*own, strict=True), strict=True)
            numbers.append(tuple(self._asked_for(index, what, values) for what, values in asked))
        key = (last.calls, last.kinds, tuple(tokens.items()))
        if key not in self._rows:
            self._rows[key] = len(self._told)
            self._told.append(replace(last, tokens=tokens))
        computed = [step.computed for step in several]
        self.fit.same([one is None for one in computed], f"what decides step {index}")
        done = [one for one in computed if one is not None]
        return Step(self._rows[key], tuple(numbers), self._step(index, done, tables, skips=False) if done else None)

    def _asked_for(self, step: int, asked: Asked, values: Sequence[Number]) -> Number:
        of, kind, _ = asked
        if isinstance(of, Site) and kind is Kind.K:
            return self._number(values, step, of.index, skips=False)
        self.fit.same(values, f"a number of step {step}")
        return values[-1]

    def _number(self, values: Sequence[Number], step: int, site: int, *, skips: bool) -> Number:
        """How many tokens a site computes; at the points as it was laid out there."""
        own = tuple(one.computed(step, site, skips=skips) for one in self.all)
        if [own[self.fit.what.values.index(point)] for point in self.fit.points] != list(values):
            raise Unlike(f"how many tokens {self.all[-1].sites[site].name} computes in step {step}")
        if own.count(own[0]) == len(own):
            return own[0]
        if own not in self._names:
            self._names[own] = f"tokens {len(self._names)}"
            self.sized[self._names[own]] = own
        return self._names[own]


def _plain(action: Action) -> Action:
    """An action without how many tokens it computes."""
    return action.of(0, action.order) if isinstance(action, Selecting) else action


def numbers_of(table: Table) -> dict[str, tuple[Told, ...]]:
    """With which numbers each entry is called."""
    open = table.open
    assert open is not None
    found: dict[str, dict[Told, None]] = {}

    def value(number: Number) -> tuple[int, ...] | None:
        return table.sized.get(number) if isinstance(number, str) else (number,) * len(open.values)

    steps = [one for step in table.steps for one in (step, step.computed) if one is not None]
    for step in steps:
        for call, numbers in zip(table.rows[step.row].calls, step.numbers, strict=True):
            found.setdefault(table.calls[call].entry, {})[tuple(map(value, numbers))] = None
    if table.test is not None:
        entry = table.calls[table.test.call].entry
        found.setdefault(entry, {}).update(dict.fromkeys(tuple(map(value, own)) for own in table.test.numbers))
    return {entry: tuple(ways) for entry, ways in found.items()}
