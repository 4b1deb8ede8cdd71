"""What an exported file says: the table of its steps (``ir/table.py``) and of what it was made, as JSON."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any

from toca_compile.errors import ExportError, PolicyError
from toca_compile.ir.anchors import Ring, Weights
from toca_compile.ir.gates import Gate
from toca_compile.ir.history import CacheSpec, History
from toca_compile.ir.plan import Skip
from toca_compile.ir.table import Call, Kept, OneEntry, Open, Row, Step, Table, Test
from toca_compile.policies.storage import part_data, part_of

FORMAT = 3
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
    told = dataclasses.asdict(replace(table, test=None))
    told["test"] = None if table.test is None else _test_data(table.test)
    return json.dumps({"about": dataclasses.asdict(about), "table": told}) + "\n"


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
    except ExportError:
        raise
    except PolicyError as error:
        raise ExportError(f"what decides at run time is not known here: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
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


def _test_data(test: Test) -> dict[str, Any]:
    skip = test.skip
    return {
        "call": test.call,
        "at": test.at,
        "stays": test.stays,
        "numbers": test.numbers,
        "threshold": skip.threshold,
        "limit": skip.limit,
        "gate": part_data(skip.gate),
        "memory": _memory_data(skip.memory),
    }


def _test(given: dict[str, Any]) -> Test:
    gate = part_of(Gate, given["gate"])
    skip = Skip(memory=_memory(given["memory"]), threshold=given["threshold"], limit=given["limit"], gate=gate)
    numbers = tuple(map(tuple, given["numbers"]))
    return Test(given["call"], given["at"], given["stays"], numbers, skip)


def _memory_data(memory: History) -> dict[str, Any]:
    """What of it tells numbers: how values are kept, the buffers say."""
    if isinstance(memory, CacheSpec):
        return {"order": memory.order, "basis": memory.basis}
    assert isinstance(memory, Ring)
    return {"kept": memory.kept, "by": None if memory.by is None else part_data(memory.by)}


def _memory(given: dict[str, Any]) -> History:
    if "order" in given:
        return CacheSpec(given["order"], None, given["basis"])
    return Ring(given["kept"], by=None if given["by"] is None else part_of(Weights, given["by"]))


def _whole(given: dict[str, Any]) -> OneEntry:
    plan, sizes = (tuple(map(tuple, given[name])) for name in ("plan", "sizes"))
    return OneEntry(given["entry"], given["inputs"], plan, sizes, tuple(given["state"]))


_PLACES = ("values", "slots", "results", "free")


def _step(given: dict[str, Any]) -> Step:
    computed = None if given["computed"] is None else _step(given["computed"])
    return Step(given["row"], tuple(map(tuple, given["numbers"])), computed)
