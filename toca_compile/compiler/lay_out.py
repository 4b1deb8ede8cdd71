"""LayOut: what each step of a plan would call in a graph, as a table (``ir/table.py``), and the variants that it calls.

The table is what is left of a plan where no schedule is at hand: in a file (``exported``), and in a step as a program
(``step_program.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toca_compile.errors import PolicyError
from toca_compile.ir.anchors import Ring
from toca_compile.ir.history import CacheSpec, Numbers, Past
from toca_compile.ir.printer import variant_name
from toca_compile.ir.program import Chain, Stream, Variant
from toca_compile.ir.state import State
from toca_compile.ir.table import Call, Kept, Number, OpenSizes, Row, Step, Table, Test
from toca_compile.ir.types import Site
from toca_compile.lowerings.inductor import told
from toca_compile.runtime.cache_state import like_buffer, owner
from toca_compile.runtime.executor import Executor
from toca_compile.runtime.schedule import Calls, Schedule, SegmentCall


@dataclass(frozen=True)
class Entry:
    """A variant, and a fake tensor or a plausible number for each of its inputs. ``sizes``: theirs, if one is open."""

    variant: Variant
    examples: tuple[Any, ...]
    sizes: OpenSizes | None = None


Asked = tuple[Site | Stream, Any, int]  # a host number: whose, which, and which of several


@dataclass(frozen=True)
class LaidOut:
    """A plan in a graph.

    Attributes:
        table: its ``weights``, ``inputs`` and ``kinds`` are left to who knows the model's call.
        entries: what its calls call, by name.
        titles: what these are, as reports call them.
        buffers: which buffer of which owner each of the table's is, and which of several.
        asked: of each of its calls, the host numbers that it is given.
        owners: the names of sites, and of what leaves skipped blocks.
        constants: the tensors in the graph itself, by place.
        inputs: how many the graph has.
        device: on which the numbers lie, where they are not the host's.
    """

    table: Table
    entries: dict[str, Entry]
    titles: dict[str, str]
    buffers: tuple[tuple[State, int, int], ...]
    asked: tuple[tuple[Asked, ...], ...]
    owners: tuple[str, ...]
    constants: dict[int, torch.Tensor]
    inputs: int
    device: torch.device


def lay_out(of: Executor, schedule: Schedule, *, in_memory: bool = False) -> LaidOut:
    """What each step of a plan calls in a graph.

    Args:
        in_memory: whether variants are given the numbers of a step, all but K, as tensors.

    Raises:
        PolicyError: the plan cannot be told beforehand.
    """
    return _Laid(of, schedule, in_memory=in_memory).out()


class _Laid:
    """A table while it is made."""

    def __init__(self, of: Executor, schedule: Schedule, *, in_memory: bool) -> None:
        self.of, self.schedule = of, schedule
        self.device = next(iter(of.program.accelerators), torch.device("cpu"))
        numbers = self.device if in_memory else None
        self.variants = of.variants.lowered(self._entry, dense=False, numbers=numbers)
        self.entries: dict[str, Entry] = {}
        self.names: dict[Any, str] = {}  # of entries, by what tells them
        self.called: dict[SegmentCall, tuple[int, list[Asked]]] = {}
        self.calls: list[Call] = []
        self.rows: dict[Any, int] = {}
        self.told: list[Row] = []
        self.titles: dict[str, str] = {}
        self.buffers: dict[tuple[State, int, int], int] = {}
        self.kept: list[Kept] = []
        self.free = of._last_uses(self.schedule)

    def out(self) -> LaidOut:
        """All of it."""
        table = self.table()
        constants = {self.of._place[node]: value for node, value in self.of._constants}
        names = tuple(owner.name for owner in self.schedule.owners)
        return LaidOut(
            table=table,
            entries=self.entries,
            titles=self.titles,
            buffers=tuple(self.buffers),
            asked=tuple(tuple(asked) for _, asked in self.called.values()),
            owners=names,
            constants=constants,
            inputs=self.of._inputs,
            device=self.device,
        )

    def table(self) -> Table:
        of, schedule = self.of, self.schedule
        plan, past = schedule.plan, Past()
        memory = plan.skip.memory
        if plan.endless and schedule.range is not None and memory.depth and not plan.adaptive:
            raise PolicyError("a plan without an end that forecasts skipped blocks has numbers of its own at each step")
        if plan.adaptive and not isinstance(memory, CacheSpec | Ring):
            raise PolicyError(f"what {type(memory).__name__} keeps of skipped blocks cannot be told at run time")
        steps = []
        for index in range(len(schedule.rows)):
            calls, uncut = schedule.calls[index], schedule.uncut[index]
            numbers = None if plan.adaptive else memory.numbers(past, index, past.made)
            step = self._step(index, calls, numbers)
            if plan.adaptive and calls is not uncut:
                step = Step(step.row, step.numbers, self._step(index, uncut, numbers))
            steps.append(step)
            if calls is uncut:
                past = plan.skip.after(past, index)
        front = [self._call(call)[0] for call in schedule.joined(schedule.uncut[0])[: of._front]]
        test = self._test()
        timed = {place for call in front[of._constant :] for place in self.calls[call].results}
        rows = [self._with_timed(row, timed, test) for row in self.told]
        return Table(
            steps=tuple(steps),
            rows=tuple(rows),
            calls=tuple(self.calls),
            buffers=tuple(self.kept),
            endless=plan.endless,
            places=len(of._place),
            weights={},
            inputs={},
            kinds={},
            clock=tuple(of._clock),
            labels=tuple(of._conditioning._labels),
            watched=tuple(i for i in of._watched if i in of._varying),
            constant=tuple(front[: of._constant]),
            timed=tuple(front[of._constant :]),
            results=tuple(self._result(node) for node in _flat(of._output)),
            test=test,
        )

    def _test(self) -> Test | None:
        """What decides at run time."""
        schedule, plan = self.schedule, self.schedule.plan
        able = [calls for calls, uncut in zip(schedule.calls, schedule.uncut, strict=True) if calls is not uncut]
        if schedule.probe is None or not able:
            return None
        call, asked = self._call(schedule.probe)
        if plan.endless and (asked or plan.skip.gate.behind):
            name = type(plan.skip.gate).__name__
            raise PolicyError(f"a plan without an end has no last step by which {name} measures")
        ahead = schedule.joined(able[0])[self.of._front :]
        numbers = [tuple(self._number(step, one, None) for one in asked) for step in range(len(schedule.rows))]
        at, stays = (schedule.until(ahead, place) for place in (schedule.probe.at, schedule.skips.start - 1))
        return Test(call, at, stays, tuple(numbers), plan.skip)

    def _with_timed(self, row: Row, timed: set[int], test: Test | None) -> Row:
        calls = [self.calls[i] for i in row.calls]
        if test is not None:
            calls.append(self.calls[test.call])
        read = tuple(sorted({place for call in calls for place in call.values if place in timed}))
        return Row(row.kinds, row.tokens, row.calls, read)

    def _result(self, node: Any) -> tuple[int, tuple[int, ...]] | None:
        if not isinstance(node, fx.Node):
            return None
        return self.of._place[node], tuple(node.meta["val"].stride())

    def _step(self, index: int, calls: Calls, moves: Numbers | None) -> Step:
        """One step. ``moves``: the numbers of what leaves skipped blocks, where they are known."""
        joined = self.schedule.joined(calls)[self.of._front :]
        rows = self.schedule.rows if calls is self.schedule.calls[index] else self.schedule.unskipped
        kinds, tokens = self.schedule.told(rows[index])
        made = [self._call(call) for call in joined]
        key = (tuple(number for number, _ in made), kinds, tuple(tokens.items()))
        if key not in self.rows:
            self.rows[key] = len(self.told)
            self.told.append(Row(tuple(sorted(k.value for k in kinds)), tokens, key[0], ()))
        numbers = tuple(tuple(self._number(index, asked, moves) for asked in asks) for _, asks in made)
        return Step(self.rows[key], numbers)

    def _number(self, step: int, asked: Asked, moves: Numbers | None) -> Number:
        of, kind, index = asked
        if isinstance(of, Site):
            return self.schedule.number(step, of, kind, index)
        measured = self._measured(step)
        if (kind, index) in measured:
            return measured[kind, index]
        return kind.named(index) if moves is None else moves[kind, index]

    def _measured(self, step: int) -> Numbers:
        """The numbers that measuring needs in a step."""
        schedule = self.schedule
        return schedule.plan.skip.gate.numbers(step, len(schedule.rows)) if schedule.probe is not None else {}

    def _call(self, call: SegmentCall) -> tuple[int, list[Asked]]:
        """A call's number, and which host numbers it asks for."""
        if call not in self.called:
            of, segment = self.of, call.segment
            entry, used, slots = self.variants.compiled(segment, call.forms, self.schedule.plan)
            asked: list[Asked] = []
            places: list[int | None] = []
            for slot in slots:
                whose = self.schedule.owners[segment.sites[slot.position]]
                if isinstance(slot.kind, State):
                    places.append(self._buffer(slot.kind, slot.index, whose))
                else:
                    places.append(None)
                    asked.append((whose, slot.kind, slot.index))
            at = segment.at if isinstance(segment, Chain) else (call.at,) if call is not self.schedule.probe else ()
            name: Any = entry()
            self.titles.setdefault(name, variant_name(segment, call.forms))
            made = Call(
                name,
                tuple(of._place[segment.inputs[i]] for i in used),
                tuple(places),
                tuple(of._place[n] for n in segment.outputs),
                tuple(place for i in at for place in self.free[i]),
            )
            self.called[call] = len(self.calls), asked
            self.calls.append(made)
        return self.called[call]

    def _buffer(self, kind: State, index: int, of: Site | Stream) -> int:
        selector = self.schedule.plan.selector
        whose = (*owner(kind, of, selector), index)
        if whose not in self.buffers:
            like = like_buffer(kind, index, of, self.schedule.keeps[of.index], self.of.program, selector)
            self.buffers[whose] = len(self.kept)
            self.kept.append(Kept(tuple(like.shape), str(like.dtype).removeprefix("torch."), str(like.device)))
        return self.buffers[whose]

    def _entry(self, variant: Variant, examples: Sequence[Any]) -> Callable[..., Any]:
        """A lowering that only names a variant: equal ones are one entry."""
        key = told(variant.module.graph, examples)
        name = self.names.setdefault(key, f"entry{len(self.names)}")
        self.entries.setdefault(name, Entry(variant, tuple(examples)))
        return lambda: name


def _flat(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)
