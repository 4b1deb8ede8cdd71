"""Conditioning: what follows from the denoising time and from what stays as it is during a run, kept by time.

Embeddings of the timestep and every block's shifts, scales and gates are the same in every sampling with the same
timesteps, labels and weights. Their segments stand in front (``passes/hoist.py``); a *row* is what they make for one
timestep, and rows are kept from one sampling to the next. Where the timesteps are known before (announced, or met
with other labels or weights), the rows of all are made at once, so that each layer is one product for all of them.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from toca_compile.runtime.sight import on_host
from toca_compile.runtime.step_control import Identity, RunConstants
from toca_compile.runtime.times import Clocks, Time, Times

log = logging.getLogger(__name__)

LIMIT = 512 << 20
"""Bytes of rows that a table holds. Where the times to come are known, those of the next steps take the place of others
then; else the row of a timestep beyond that is made in each step."""
_SHARE = 32  # of a GPU's memory, if that is more
TABLES = 4  # of one graph: guidance passes, pictures and prompts in turns have labels of their own
_LARGE = 1 << 20  # numbers of an input beyond which not all are compared
_SAMPLED = 128  # numbers of a weight that are looked at: each is a cache line
_AT_ONCE = 64  # rows

ALONE = Times(waits=True)
"""A step whose inputs tell all that is known."""

Row = dict[int, torch.Tensor]  # by place among a step's values


class Part(Protocol):
    """A segment in front: a call of the values at some places, which makes those at others."""

    @property
    def call(self) -> Callable[..., Sequence[Any]]: ...
    @property
    def values(self) -> tuple[int, ...]: ...
    @property
    def results(self) -> tuple[int, ...]: ...


class Seen:
    """What some inputs were, to be told apart at little cost. Those on the host are told by their values, weights and
    what is as large by object, version, address and some of their numbers: a write through ``.data`` (as when LoRA is
    fused) leaves no other trace. What lies on a device is told as ``RunConstants`` tells it."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        ways: dict[Callable[[Any], bool] | None, list[int]] = {_is_small: [], _is_watched: [], None: []}
        for i, value in enumerate(inputs):
            ways[next((way for way in (_is_small, _is_watched) if way(value)), None)].append(i)
        self._small, self._watched, self._others = ways.values()
        self._values = [inputs[i].clone() for i in self._small]
        self._made = [(Identity(inputs[i]), inputs[i]._version, inputs[i].data_ptr()) for i in self._watched]
        # Views: as long as the objects and their addresses are the same, they show what the weights are now.
        self._views = [_sampled(inputs[i]) for i in self._watched]
        self._numbers = self._sample()
        self._unseen = RunConstants.of([inputs[i] for i in self._others], {})

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether these are the same inputs, unchanged."""
        return (
            all(torch.equal(value, inputs[i]) for value, i in zip(self._values, self._small, strict=True))
            and all(
                made.is_this(inputs[i]) and (version, address) == (inputs[i]._version, inputs[i].data_ptr())
                for (made, version, address), i in zip(self._made, self._watched, strict=True)
            )
            and all(torch.equal(a, b) for a, b in zip(self._numbers, self._sample(), strict=True))
            and self._unseen.holds([inputs[i] for i in self._others])
        )

    def _sample(self) -> list[torch.Tensor]:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for view in self._views:
            by_dtype.setdefault(view.dtype, []).append(view)
        return [torch.cat(views) for views in by_dtype.values()]


def _is_small(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and on_host(value) and not isinstance(value, torch.nn.Parameter)
    return plain and value.numel() <= _LARGE


def _is_watched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and on_host(value) and value.is_contiguous() and not value.is_inference()


def _limit(like: torch.Tensor) -> int:
    """Bytes that a table may hold where a tensor lies."""
    if like.device.type != "cuda":
        return LIMIT
    return max(LIMIT, torch.cuda.get_device_properties(like.device).total_memory // _SHARE)


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    """Numbers of a weight at even distances, from changing places in its rows."""
    flat = weight.detach().view(-1)
    return flat[:: (flat.numel() // _SAMPLED) | 1]


@dataclass
class Table:
    """The rows for some labels and weights. ``clocks``: the inputs that told the time of each; ``uses``: steps that
    took one; ``limit``: bytes that it may hold, ``full``: whether it was asked to hold more."""

    labels: Seen
    weights: Seen
    limit: int = LIMIT
    rows: dict[Time, Row] = field(default_factory=dict)
    clocks: Clocks = field(default_factory=dict)
    bytes: int = 0
    uses: int = 0
    full: bool = False

    def clear(self) -> None:
        """Make room for all other rows."""
        self.rows, self.clocks, self.bytes, self.full = {}, {}, 0, False

    def keep(self, time: Time, clocks: tuple[torch.Tensor, ...], row: Row) -> bool:
        """Keep a row, or what is new of it, if there is room; whether there was."""
        new = {place: value for place, value in row.items() if place not in self.rows.get(time, ())}
        size = sum(value.numel() * value.element_size() for value in new.values())
        self.full |= self.bytes + size > self.limit
        if not self.full:
            self.bytes += size
            self.rows[time], self.clocks[time] = row, clocks
        return not self.full


class Conditioning:
    """The segments of a graph that follow from the time, and how their values are found.

    Args:
        clock: the graph's inputs that tell the time, by number.
        labels: its other inputs that are no parameters and that the segments read.
        weights: the parameters that they read.
        row_bytes: of all values of a row.
        at_once: whether the parts can be computed for several times at once, as far as is known.
    """

    def __init__(
        self,
        clock: Sequence[int],
        labels: Sequence[int],
        weights: Sequence[int],
        row_bytes: int = 0,
        *,
        at_once: bool = True,
    ) -> None:
        self._clock, self._labels, self._weights, self._row_bytes = clock, labels, weights, row_bytes
        self._at_once = at_once

    def sees_weights(self, values: Sequence[Any]) -> bool:
        """Whether the weights among the values of a step lie on the host, so that any change of them shows."""
        return not self._weights or on_host(values[self._weights[0]])

    def fill(
        self,
        values: list[Any],
        parts: Sequence[Part],
        wanted: frozenset[int],
        tables: list[Table],
        *,
        full: bool,
        times: Times = ALONE,
    ) -> None:
        """Put the values at the places ``wanted`` of one step.

        Args:
            values: of the step; its inputs are there.
            parts: the segments, in order.
            tables: those of the graph, the last used first; a new one is added.
            full: whether the step computes everything. Only then weights are looked at: what other steps take from
                caches was made with those of the last full step too.
            times: what the host knows of the step's time, and of those to come.
        """
        table = self._table(values, tables, full=full)
        table.uses += 1
        clock = [values[i] for i in self._clock]
        time = times.time(clock)
        row = table.rows.get(time) if time is not None else None
        if row is None and time is not None and (table.full or not table.rows) and self._at_once:
            known = next((other.clocks for other in tables[1:] if time in other.clocks), {})
            known = known if len(known) > 1 else times.ahead(clock)
            if len(known) > 1:
                table.clear()
                self._make_rows(table, known, values, parts)
            row = table.rows.get(time)
        if row is None or not wanted <= row.keys():
            row = self._make(values, parts, wanted, row or {})
            if time is not None:
                table.keep(time, tuple(c.clone() for c in clock), row)
        for place in wanted:
            values[place] = row[place]

    def find(self, values: list[Any], wanted: frozenset[int], tables: list[Table], times: Times) -> bool:
        """As ``fill`` in a step that does not compute everything, if what it wants was made before; whether it was."""
        if not tables or not tables[0].labels.holds([values[i] for i in self._labels]):
            return False
        time = times.time([values[i] for i in self._clock])
        row = tables[0].rows.get(time) if time is not None else None
        if row is None or not wanted <= row.keys():
            return False
        tables[0].uses += 1
        for place in wanted:
            values[place] = row[place]
        return True

    def _table(self, values: Sequence[Any], tables: list[Table], *, full: bool) -> Table:
        labels, weights = [values[i] for i in self._labels], [values[i] for i in self._weights]
        for i, table in enumerate(tables):
            # One that the run did not begin with may be of weights that were changed meanwhile.
            if table.labels.holds(labels) and (table.weights.holds(weights) if full or i else True):
                tables.insert(0, tables.pop(i))
                return table
        tables.insert(0, Table(Seen(labels), Seen(weights), _limit(values[self._clock[0]])))
        # Of labels that are others at each step, or cannot be told to be the same, only one row is ever asked for.
        self._at_once &= not any(len(table.rows) > 1 and table.uses == 1 for table in tables[TABLES:])
        del tables[TABLES:]
        return tables[0]

    def _make(self, values: Sequence[Any], parts: Sequence[Part], wanted: frozenset[int], row: Row) -> Row:
        """A row in which the places ``wanted`` are filled. Parts whose values nothing in the step reads are left
        out: those of blocks that it skips."""
        needed, chosen = set(wanted), []
        for part in reversed(parts):
            if needed.intersection(part.results) and not row.keys() >= set(part.results):
                chosen.append(part)
                needed.update(part.values)
        own, made = list(values), dict(row)
        for place, value in row.items():
            own[place] = value
        for part in reversed(chosen):
            results = part.call(*(own[place] for place in part.values))
            for place, value in zip(part.results, results, strict=True):
                # Nothing of the caller's, who may write to it; and as the graphs behind were compiled to take it.
                own[place] = made[place] = value.clone(memory_format=torch.contiguous_format)
        return made

    def _make_rows(self, table: Table, known: Clocks, values: Sequence[Any], parts: Sequence[Part]) -> None:
        """Make the rows of several times with these labels and weights."""
        times, several_fit = list(known), min(_AT_ONCE, table.limit // max(self._row_bytes, 1))
        for first in range(0, len(times), several_fit) if several_fit > 1 else ():
            chosen = times[first : first + several_fit]
            own = list(values)
            for i, clocks in zip(self._clock, zip(*(known[time] for time in chosen), strict=True), strict=True):
                own[i] = torch.stack(clocks)
            several = set(self._clock)
            try:
                for part in parts:
                    dims = tuple(0 if place in several else None for place in part.values)
                    arguments = [own[place] for place in part.values]
                    if any(d == 0 for d in dims):
                        results = torch.func.vmap(part.call, in_dims=dims)(*arguments)
                        several.update(part.results)
                    else:
                        results = part.call(*arguments)
                    for place, value in zip(part.results, results, strict=True):
                        own[place] = value.clone(memory_format=torch.contiguous_format)
            except Exception as error:  # whatever an op makes of a dimension more
                log.info("rows for several timesteps are made one by one: %s", error)
                self._at_once = False
                return
            places = [place for part in parts for place in part.results]
            for i, time in enumerate(chosen):
                row = {p: own[p][i] if p in several else own[p] for p in places}
                if not table.keep(time, known[time], row):
                    return
