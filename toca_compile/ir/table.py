"""The table of a plan in a graph: what each of its steps calls, with which values, buffers and host numbers.

A step is a list of values by place: first the graph's inputs (weights and what the caller gives), then what calls make.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toca_compile.ir.plan import Skip

Number = int | str  # of a host number: itself, or the name of one that a call's size tells, or only a run
Size = int | tuple[int, int]  # of a dimension: itself, or of the open size which multiple, plus which number
Told = tuple[tuple[int, ...] | None, ...]  # host numbers: of each its value by size; None where only a run tells it


def at(size: Size, open: int) -> int:
    """A size where the open one is known."""
    return size if isinstance(size, int) else size[0] * open + size[1]


@dataclass(frozen=True)
class Open:
    """A size that may be any in a range, such as the batch's."""

    name: str
    least: int
    most: int

    @property
    def values(self) -> range:
        """All of them."""
        return range(self.least, self.most + 1)


@dataclass(frozen=True)
class OpenSizes:
    """Sizes of a variant's inputs, of which one is open.

    Attributes:
        shapes, strides: of each input; of a host number nothing.
        values: that the open size takes.
        name: as the user calls it.
        numbers: which host numbers the variant is called with, of each call by those values.
    """

    shapes: tuple[tuple[Size, ...], ...]
    strides: tuple[tuple[Size, ...], ...]
    values: range
    name: str
    numbers: tuple[Told, ...] = ((),)


@dataclass(frozen=True)
class Kept:
    """A buffer that lives from step to step, zero when a run begins."""

    shape: tuple[Size, ...]
    dtype: str
    device: str


@dataclass(frozen=True)
class Call:
    """A call of one entry.

    Attributes:
        entry: which.
        values: the places of the values that it is given.
        slots: what it is given behind them: the number of a buffer, or None for a host number.
        results: the places of what it makes.
        free: the places of values that nothing later needs.
    """

    entry: str
    values: tuple[int, ...]
    slots: tuple[int | None, ...]
    results: tuple[int, ...]
    free: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What steps do that run the same calls. ``kinds``: of steps that its sites do; ``tokens``: how many each computes,
    by its name; ``timed``: the places that the calls read of what follows from the denoising time."""

    kinds: tuple[str, ...]
    tokens: Mapping[str, Number]
    calls: tuple[int, ...]
    timed: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One step: its row, and the host numbers of each of the row's calls. ``computed``: the same, if a test at run time
    may say that the step computes what its row skips."""

    row: int
    numbers: tuple[tuple[Number, ...], ...]
    computed: "Step | None" = None


@dataclass(frozen=True)
class Test:
    """What decides at run time whether a step skips blocks: a call that tells how much changed before them.

    Attributes:
        call: which.
        at: how many of a row's calls come before it.
        stays: how many of these are not done again where the step then computes what it could skip.
        numbers: of each step, the host numbers of the call.
        skip: what is measured, what that is held against, and what is kept of the blocks.
    """

    __test__ = False  # no class of tests

    call: int
    at: int
    stays: int
    numbers: tuple[tuple[Number, ...], ...]
    skip: Skip


@dataclass(frozen=True)
class OneEntry:
    """Whole steps as one entry, which is told by its buffers what a step is to do (``compiler/emit_step.py``).

    Attributes:
        entry: its name. It is given the graph's inputs, a tensor for each number of tokens, and its buffers.
        inputs: how many the graph has.
        plan: of each step its kind and its numbers.
        sizes: of each step the second dimension of each tensor that tells a number of tokens.
        state: what the buffers are called: ``step``, ``plan``, ``past``, ``cache0`` of the table's first buffer, and
            ``x12`` of the constant at place 12.
    """

    entry: str
    inputs: int
    plan: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    state: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """All of it.

    Attributes:
        endless: whether the last step repeats; else a call after it begins a new run.
        places: how many values a step has.
        weights: which tensor of the file stands at which place.
        inputs: what of the caller's arguments stands at which place.
        kinds: shape, stride, dtype and device of those.
        clock, labels: places of inputs that tell the denoising time, and of others that what follows from it reads.
        watched: places of the inputs from which the constants of a run follow.
        constant, timed: the calls that make these.
        results: the place of each of the graph's results, with its stride; None where it is none.
        open: the size that the run's first call tells; None where all are fixed.
        sized: the numbers that follow from it, by name: one for each size, the least first.
        whole: one entry in the place of all that the steps call; None where each is an entry of its own.
    """

    steps: tuple[Step, ...]
    rows: tuple[Row, ...]
    calls: tuple[Call, ...]
    buffers: tuple[Kept, ...]
    endless: bool
    places: int
    weights: dict[int, str]
    inputs: dict[int, str]
    kinds: dict[int, dict[str, Any]]
    clock: tuple[int, ...]
    labels: tuple[int, ...]
    watched: tuple[int, ...]
    constant: tuple[int, ...]
    timed: tuple[int, ...]
    results: tuple[tuple[int, tuple[Size, ...]] | None, ...]
    test: Test | None = None
    open: Open | None = None
    sized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    whole: OneEntry | None = None

    @property
    def entries(self) -> list[str]:
        """The names of all entries."""
        if self.whole is not None:
            return [self.whole.entry]
        return list(dict.fromkeys(call.entry for call in self.calls))
