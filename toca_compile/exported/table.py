"""The table of an exported model: what each step of its plan calls, with which values, buffers and host numbers.

A step is a list of values by place: first the graph's inputs (weights and what the caller gives), then what calls make.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from toca_compile.errors import ExportError

Number = int | str  # of a host number: itself, or the name of one that is only known at run time

FORMAT = 1
"""The version of the file's format: a file of another is refused."""


@dataclass(frozen=True)
class Kept:
    """A buffer that lives from step to step, zero when a run begins."""

    shape: tuple[int, ...]
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
    """What steps do that run the same calls. ``kinds``: of steps that its sites do; ``tokens``: how many each computes;
    ``timed``: the places that the calls read of what follows from the denoising time."""

    kinds: tuple[str, ...]
    tokens: dict[str, int]
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
        at: how many of a step's calls come before it.
        threshold, limit: as ``Skip`` has them.
        order, basis: of what is kept of the blocks.
    """

    __test__ = False  # no class of tests

    call: int
    at: int
    threshold: float
    limit: int | None
    order: int
    basis: str


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
    results: tuple[tuple[int, tuple[int, ...]] | None, ...]
    test: Test | None = None

    @property
    def entries(self) -> list[str]:
        """The names of all entries."""
        return list(dict.fromkeys(call.entry for call in self.calls))


@dataclass(frozen=True)
class About:
    """What the file says of itself.

    Attributes:
        model: the class that was exported.
        torch: the version of torch that compiled it.
        machine: what it was compiled for.
        policy: as JSON, or the name of one that JSON does not hold.
        parameters: of the model's call, in order.
        defaults: those that have one, and what it is.
        given: arguments that are no tensors, and what they were: compiled in.
        returns: how the results are arranged (``signature.py``).
        config: the model's own.
        names: of tensors that the model's state dict calls otherwise.
    """

    model: str
    torch: str
    machine: dict[str, str]
    policy: Any
    parameters: tuple[str, ...]
    defaults: dict[str, Any]
    given: dict[str, Any]
    returns: Any
    config: Any = None
    names: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def to_json(about: About, table: Table) -> str:
    """Both as text."""
    return json.dumps({"about": dataclasses.asdict(about), "table": dataclasses.asdict(table)}) + "\n"


def from_json(text: str) -> tuple[About, Table]:
    """What ``to_json`` wrote.

    Raises:
        ExportError: it is nothing of that, or of another version of the format.
    """
    try:
        given = json.loads(text)
        version = given["about"]["format"]
        if version != FORMAT:
            raise ExportError(f"it is of format {version}, and this version of toca_compile reads {FORMAT}")
        about = About(**{**given["about"], "parameters": tuple(given["about"]["parameters"])})
        return about, _table(given["table"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"its table cannot be read: {type(error).__name__}: {error}") from error


def _table(given: dict[str, Any]) -> Table:
    own = dict(given)
    own["steps"] = tuple(_step(step) for step in given["steps"])
    own["rows"] = tuple(
        Row(tuple(r["kinds"]), r["tokens"], tuple(r["calls"]), tuple(r["timed"])) for r in given["rows"]
    )
    own["calls"] = tuple(Call(c["entry"], *(tuple(c[n]) for n in _PLACES)) for c in given["calls"])
    own["buffers"] = tuple(Kept(tuple(b["shape"]), b["dtype"], b["device"]) for b in given["buffers"])
    for name in ("weights", "inputs", "kinds"):
        own[name] = {int(place): value for place, value in given[name].items()}
    for name in ("clock", "labels", "watched", "constant", "timed"):
        own[name] = tuple(given[name])
    own["results"] = tuple(None if r is None else (r[0], tuple(r[1])) for r in given["results"])
    own["test"] = None if given["test"] is None else Test(**given["test"])
    return Table(**own)


_PLACES = ("values", "slots", "results", "free")


def _step(given: dict[str, Any]) -> Step:
    computed = None if given["computed"] is None else _step(given["computed"])
    return Step(given["row"], tuple(map(tuple, given["numbers"])), computed)
