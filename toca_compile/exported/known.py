"""Known: what follows from the denoising time, in a file. Where the timesteps are known it is made at export, so that
the first run too looks it up (``runtime/conditioning.py``)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from toca_compile.ir.table import Call
from toca_compile.runtime.conditioning import Conditioning, Seen, Table
from toca_compile.runtime.times import ahead, time_of

if TYPE_CHECKING:
    from toca_compile.exported.write import Traced


@dataclass(frozen=True)
class Part:
    """A call of what follows from the time, as ``Conditioning`` takes it."""

    of: Call
    entry: Callable[[list[Tensor]], Sequence[Tensor]]

    @property
    def values(self) -> tuple[int, ...]:
        return self.of.values

    @property
    def results(self) -> tuple[int, ...]:
        return self.of.results

    def call(self, *arguments: Tensor) -> Sequence[Tensor]:
        return self.entry(list(arguments))


def known_rows(traced: "Traced", timesteps: Sequence[float]) -> dict[str, Any]:
    """The rows of these timesteps as far as they can be told from the example's, as plain data: ``labels``, tensors
    that they follow from besides; ``clocks``, the tensors that tell each time; ``rows``, what is made of it, by place.
    Nothing where the model computes nothing of the time beforehand, or of the run's constants."""
    table = traced.table
    parts = [
        Part(table.calls[i], lambda given, name=table.calls[i].entry: traced.laid.entries[name].variant.module(*given))  # type: ignore[misc]
        for i in table.timed
    ]
    made = {place for part in parts for place in part.results}
    read = {place for part in parts for place in part.values}
    if not parts or not read <= {*made, *range(traced.laid.inputs)}:
        return {}
    values = [*traced.recorder.inputs, *[None] * (table.places - len(traced.recorder.inputs))]
    conditioning, tables = Conditioning(table.clock, table.labels, (), at_once=False), list[Table]()
    wanted = frozenset(place for row in table.rows for place in row.timed)
    for clocks in ahead([values[i] for i in table.clock], timesteps, before=True).values():
        for place, clock in zip(table.clock, clocks, strict=True):
            values[place] = clock
        conditioning.fill(values, parts, wanted, tables, full=True)
    if not tables:
        return {}
    return {
        "labels": [values[i] for i in table.labels],
        "clocks": [list(tables[0].clocks[time]) for time in tables[0].rows],
        "rows": list(tables[0].rows.values()),
    }


def as_table(known: Mapping[str, Any]) -> Table:
    """What ``known_rows`` made, as it is looked up."""
    table = Table(Seen(known["labels"]), Seen(()))
    for clocks, row in zip(known["clocks"], known["rows"], strict=True):
        time = time_of(clocks)
        if time is not None:
            table.keep(time, tuple(clocks), row)
    return table
