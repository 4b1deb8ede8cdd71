"""What an exported file says: the table of its steps (``ir/table.py``) and of what it was made, as JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from toca_compile.errors import ExportError
from toca_compile.ir.table import Call, Kept, OneEntry, Open, Row, Step, Table, Test

FORMAT = 2
"""The version of the file's format: a file of another is refused."""


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
    own["sized"] = {name: tuple(values) for name, values in given["sized"].items()}
    own["results"] = tuple(None if r is None else (r[0], tuple(r[1])) for r in given["results"])
    own["test"] = None if given["test"] is None else _test(given["test"])
    own["open"] = None if given["open"] is None else Open(**given["open"])
    own["whole"] = None if given["whole"] is None else _whole(given["whole"])
    return Table(**own)


def _test(given: dict[str, Any]) -> Test:
    return Test(**given | {"adds": tuple(given["adds"]), "numbers": tuple(map(tuple, given["numbers"]))})


def _whole(given: dict[str, Any]) -> OneEntry:
    plan, sizes = (tuple(map(tuple, given[name])) for name in ("plan", "sizes"))
    return OneEntry(given["entry"], given["inputs"], plan, sizes, tuple(given["state"]))


_PLACES = ("values", "slots", "results", "free")


def _step(given: dict[str, Any]) -> Step:
    computed = None if given["computed"] is None else _step(given["computed"])
    return Step(given["row"], tuple(map(tuple, given["numbers"])), computed)
