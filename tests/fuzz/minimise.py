"""A failing case made as small as it can be: one feature after another goes back to its default while the same kind of
failure stays."""

import dataclasses
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tests.fuzz.grammar import Spec, default_of, written
from tests.fuzz.oracles import Failure, examine
from toca_compile import TocaError

_COUNTS = ("num_steps",)  # their default is not their smallest


def failure_of(spec: Spec, policy: Any, kind: str) -> Failure | None:
    """The failure of that kind, if the case has one."""
    try:
        return next((f for f in examine(spec, [policy]) if f.kind == kind), None)
    except Exception:  # a description of which no model can be built
        return None


def minimise(spec: Spec, failure: Failure, seconds: float = 60.0) -> tuple[Spec, Failure]:
    """A simpler case with the same kind of failure, as far as the time goes."""
    end, at, moved = time.monotonic() + seconds, 0, False
    # No case is tried twice: a default need not be made of defaults, so that two may lead to each other.
    tried = {written((spec, failure.policy))}
    while time.monotonic() < end:
        # After a success the place in the list is kept: what was in vain before is likely to be so again.
        step = next(islice(_neighbours(spec, failure.policy), at, None), None)
        if step is None:
            if not moved:
                break
            at, moved = 0, False
            continue
        if written(step) in tried:
            at += 1
            continue
        tried.add(written(step))
        found = failure_of(*step, failure.kind)
        if found is None:
            at += 1
        else:
            spec, failure, moved = step[0], dataclasses.replace(found, policy=step[1]), True
    return spec, failure


def as_test(spec: Spec, failure: Failure) -> str:
    """An entry for ``test_finds.py``."""
    return f"    (\n        {written(spec)},\n        {written(failure.policy)},\n    ),  # {failure.kind}"


def _neighbours(spec: Spec, policy: Any) -> Iterator[tuple[Spec, Any]]:
    for smaller in simpler(spec):
        yield smaller, policy
    for other in simpler(policy):
        yield spec, other


def simpler(value: Any) -> Iterator[Any]:
    """Everything that is one step simpler."""
    if isinstance(value, tuple):
        if len(value) > 1:
            yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        for i, item in enumerate(value):
            yield from ((*value[:i], other, *value[i + 1 :]) for other in simpler(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            held, usual = getattr(value, f.name), default_of(f)
            if f.name in _COUNTS:
                others: Any = range(2, held)
            elif usual is not dataclasses.MISSING and held != usual:
                others = (usual, *simpler(held))
            else:
                others = simpler(held)
            for other in others:
                try:
                    yield dataclasses.replace(value, **{f.name: other})
                except (TocaError, IndexError, TypeError):
                    continue  # a part that cannot be
