"""Schedule: a plan laid out for one graph, before the first step: what each segment does in each step, with which host
numbers. It knows no tensors, so it can be made, kept and compared without a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from toca_compile.ir.plan import CacheSpec, Plan, SiteStep, scored_sites
from toca_compile.ir.program import Mode, Program, Slot
from toca_compile.ir.types import Action, Site


@dataclass(frozen=True)
class Cell:
    """One segment in one step: the modes of its sites and their host numbers."""

    modes: tuple[Mode, ...]
    memories: tuple[CacheSpec, ...]
    variant: int  # numbers modes and memories, cheaper to look up
    numbers: dict[Slot, int]


class Schedule:
    """What each step of a plan does in a graph.

    Attributes:
        rows: of each step, what each site does as planned.
        unskipped: the same, if the step computes what it could skip.
        cells: of each step, what each segment does.
    """

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self.memories = [plan.cache_spec(site.index) for site in program.sites]
        self._tokenwise = [plan.tokenwise(site.index) for site in program.sites]
        self._numbered: dict[Any, int] = {}
        self.rows = [step.sites for step in plan.steps]
        self.unskipped = [self.computed(row) for row in self.rows]
        self._scored = scored_sites(plan, program.sites)
        self.cells = [self._cell_row(i, *history) for i, history in enumerate(self._histories())]

    @property
    def steps(self) -> int | None:
        """How many there are; None: any number."""
        return None if self.plan.endless else len(self.rows)

    def kept(self) -> list[tuple[Slot, Site]]:
        """The buffers that live from step to step, each with its site."""
        slots = []
        scored = set().union(*self._scored) if self._scored else set()
        for site in self.program.sites:
            if not self.plan.reads(site.index):
                continue
            partial = self.plan.partial(site.index)
            held = range(len(site.row_proof.stale_inputs)) if self._holds(site) and site.row_proof is not None else ()
            keys = (
                range(len(site.query_proof.dense_inputs))
                if site.query_proof and self.plan.keeps_keys(site.index)
                else ()
            )
            slots += [(Slot("keys", 0, i), site) for i in keys]
            slots += [(Slot("diff", 0, i + 1), site) for i in range(self.memories[site.index].order)]
            kinds = ["cache", *(["stamp"] if partial else []), *(["score"] if site.index in scored else [])]
            slots += [(Slot(kind, 0), site) for kind in kinds] + [(Slot("held", 0, i), site) for i in held]
        return slots

    def computed(self, row: tuple[SiteStep, ...]) -> tuple[SiteStep, ...]:
        """A row with nothing skipped; the same object where nothing was."""
        if all(s.action is not Action.SKIP for s in row):
            return row
        return tuple(
            SiteStep(Action.COMPUTE, site.axis.size) if s.action is Action.SKIP else s
            for site, s in zip(self.program.sites, row, strict=True)
        )

    def _cell_row(self, index: int, since: Sequence[Sequence[int]], made: Sequence[int]) -> list[Cell]:
        row, scored = self.unskipped[index], self._scored[index]
        cells = []
        for segment in self.program.segments:
            modes: list[Mode] = []
            memories = tuple(self.memories[number] for number in segment.sites)
            numbers: dict[Slot, int] = {}
            for position, number in enumerate(segment.sites):
                site = self.program.sites[number]
                todo, history, memory = row[number], since[number], self.memories[number]
                modes.append(self._mode(site, todo, number in scored))
                numbers |= {
                    Slot("k", position): todo.tokens,
                    Slot("step", position): index,
                    Slot("since", position): history[-1] if history else 0,
                    Slot("site", position): number,
                }
                for order in range(1, memory.order + 1):
                    used = order <= (made[number] if todo.action is Action.COMPUTE else todo.order)
                    own = self._tokenwise[number]
                    power = 0 if not used else 1 if own else memory.power(history, index, order)
                    numbers[Slot("power", position, order)] = power
                    numbers[Slot("spacing", position, order)] = memory.spacing([*history, index], order)
            variant = self._numbered.setdefault((*modes, *memories), len(self._numbered))
            cells.append(Cell(tuple(modes), memories, variant, numbers))
        return cells

    def _mode(self, site: Site, todo: SiteStep, scored: bool) -> Mode:
        own = Mode.TOKENS if self._tokenwise[site.index] else Mode.PLAIN
        keys = self.plan.keeps_keys(site.index)
        alone = Mode.PLAIN if todo.update else Mode.FORECAST  # the others are forecast, and nothing is kept
        if todo.action is Action.QUERIES:
            source = {"fresh": Mode.KEYS if keys else Mode.PLAIN, "keep": Mode.KEPT, "update": Mode.KEPT | Mode.UPDATE}
            return Mode.PARTIAL | Mode.QUERIES | source[todo.keys] | own | alone
        if todo.action is Action.REUSE:
            return Mode.REUSE
        if todo.action is not Action.COMPUTE:
            return (Mode.PARTIAL | alone if todo.action is Action.PARTIAL else Mode.FORECAST) | own
        if not self.plan.reads(site.index):
            return Mode.SCORE if scored else Mode.PLAIN
        kept = {Mode.SCORE: scored, Mode.HOLD: self._holds(site), Mode.KEYS: keys, Mode.DIFF: todo.order > 0}
        return reduce(or_, (mode for mode, wanted in kept.items() if wanted), Mode.STORE | own)

    def _holds(self, site: Site) -> bool:
        """Whether partial steps take values from the cache that full steps must keep."""
        partial = self.plan.ever(site.index, Action.PARTIAL)
        return partial and site.row_proof is not None and bool(site.row_proof.stale_inputs)

    def _histories(self) -> Iterator[tuple[list[list[int]], list[int]]]:
        """For each step, of each site: the last steps before it that computed all, and how many differences are
        kept."""
        kept = max((memory.order for memory in self.memories), default=0) + 1
        last: list[list[int]] = [[] for _ in self.program.sites]
        made = [0] * len(last)
        for i, row in enumerate(self.rows):
            yield [list(steps) for steps in last], list(made)
            for site, todo in enumerate(row):
                if todo.action is Action.COMPUTE:
                    last[site] = [*last[site], i][-kept:]
                    made[site] = todo.order
