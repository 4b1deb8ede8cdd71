"""Peers: the processes that share a graph's work, and what is said where they part ways.

Each runs the same graph by the same plan, or what they send each other does not belong together, and a collective
waits for ever or takes one value for another. So at the first step of a run each writes what it is about to do to the
store of their group, which stands beside the collectives, and reads what the others wrote. Where a collective fails
later on, they ask each other in the same way who is still there.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from toca_compile.errors import ProcessError
from toca_compile.ir.graph import value_of
from toca_compile.ir.program import GraphPlan, Program

_GRACE = 0.1  # of a group's timeout: how long one that has lost the others waits for what they say of it


@dataclass
class Group:
    """Processes that send each other values: the ``store`` that all of them reach, this one's place among them, the
    numbers of all, and for how long one waits for another. ``run``: how many runs they began together."""

    store: Any
    place: int
    ranks: Sequence[int]
    timeout: timedelta
    run: int = field(default=0, init=False)

    def said(self, about: str, own: str, wait: timedelta) -> dict[int, str]:
        """What the processes say ``about`` something, by their numbers, of those that say it in time."""
        end, found = time.monotonic() + wait.total_seconds(), {}
        self.store.set(f"toca/{about}/{self.place}", own)
        for place, rank in enumerate(self.ranks):
            key, left = f"toca/{about}/{place}", max(end - time.monotonic(), 1e-3)
            with suppress(RuntimeError):
                self.store.wait([key], timedelta(seconds=left))
                found[rank] = self.store.get(key).decode()
        return found

    def forget(self, about: str) -> None:
        """Take back what this process said."""
        with suppress(RuntimeError):  # not every store can
            self.store.delete_key(f"toca/{about}/{self.place}")


def group_of(name: str, device: torch.device) -> Group | None:
    """The group that collectives call by a name; None for one whose processes have no store."""
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
    try:
        store, timeout = group.get_group_store(), group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return Group(store, group.rank(), dist.get_process_group_ranks(group), timeout)


class Peers:
    """Those with which this process shares a graph.

    Args:
        groups: of all collectives in the graph.
        facts: what must be the same in all, by name, whatever is sampled.
    """

    def __init__(self, groups: Sequence[Group], facts: Mapping[str, str]) -> None:
        self._groups, self._facts = groups, dict(facts)

    def begin(self, facts: Mapping[str, str]) -> None:
        """A run begins: wait for the others, and compare what each is about to do, ``facts`` by name.

        Raises:
            ProcessError: another does otherwise, or does not come within the group's timeout.
        """
        own = json.dumps({**self._facts, **facts})
        for group in self._groups:
            # Counted where all see it, and so from the start again in another group.
            group.run = _reached(lambda of=group: of.store.add(f"toca/runs/{of.place}", 1))
            said = _reached(lambda of=group: of.said(f"run {of.run}", own, of.timeout))
            if group.ranks[group.place] not in said:
                raise ProcessError(_UNREACHED)
            missing = [rank for rank in group.ranks if rank not in said]
            if missing:
                group.forget(f"run {group.run}")  # or who comes late would go on as if all were there
                raise ProcessError(
                    f"{_named(missing)} did not begin this sampling within {group.timeout.total_seconds():g} s: it "
                    f"died, or does something else than {_named(list(said))}. Processes that share a model call it "
                    "alike, in the same order"
                )
            apart = differences({rank: json.loads(text) for rank, text in said.items()})
            if apart:
                raise ProcessError(
                    f"processes that share a model must do the same, and these do not. {'. '.join(apart)}. Give all of "
                    "them the same inputs, policy and settings"
                )
            group.forget(f"run {group.run - 1}")  # which all have read

    def failed(self, error: BaseException, step: int) -> ProcessError | None:
        """A step failed here: tell the others, and say who is to blame, if it is not this process."""
        if isinstance(error, ProcessError):
            return None
        ours = not _is_of_collectives(error)
        own = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" if ours else ""
        for group in self._groups:
            wait = timedelta(0) if ours else group.timeout * _GRACE
            try:
                said = group.said(f"failed {group.run}", own, wait)
            except RuntimeError:
                said = {}
            if ours:
                continue
            gone = [rank for rank in group.ranks if rank not in said]
            why = [f"{_named([rank])} failed by itself ({text})" for rank, text in said.items() if text]
            why += [f"{_named(gone)} does not answer: it died, or has stopped calling the model"] if gone else []
            if why:
                return ProcessError(f"step {step} of a sampling that processes share failed: {'; '.join(why)}")
        return None


_UNREACHED = (
    "the store of the process group cannot be reached, so the process that keeps it (usually process 0) is gone"
)


def _reached(ask: Any) -> Any:
    try:
        return ask()
    except RuntimeError as error:
        raise ProcessError(f"{_UNREACHED}: {str(error).splitlines()[0]}") from error


def _is_of_collectives(error: BaseException) -> bool:
    """Whether an error is what a collective says of the other processes. Gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def peers_of(program: Program, settings: str) -> Peers | None:
    """Those of a graph; None where it has no collectives, or its groups no store. ``settings``: of the session."""
    names = program.types.groups if program.types is not None else ()
    devices = [x.device for n in program.placeholders if isinstance(x := value_of(n), torch.Tensor)]
    found = [group for name in names if (group := group_of(name, devices[0])) is not None]
    if not found:
        return None
    ops = [_plain(str(n.target)) for n in program.module.graph.nodes if n.op == "call_function"]
    return Peers(found, {"settings": settings, "graph": f"{len(ops)} operations, {_digest(' '.join(ops))}"})


def about(program: Program, planned: GraphPlan, inputs: Sequence[Any], names: Sequence[str]) -> dict[str, str]:
    """What a run is about to do: its plan, and what it is given; ``names``: the inputs', as the caller knows them."""
    known = names if len(names) == len(inputs) else [""] * len(inputs)
    given = {
        f"input {known[i] or i}": f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        for i, (node, x) in enumerate(zip(program.placeholders, inputs, strict=True))
        if isinstance(x, torch.Tensor) and node in program.varying
    }
    return {**given, "policy": f"{_plain(planned.policy)} (plan {_digest(_plain(repr(planned.plan)))})"}


def differences(said: Mapping[int, Mapping[str, str]]) -> list[str]:
    """In what processes differ, a sentence each."""
    found = []
    for name in dict.fromkeys(name for facts in said.values() for name in facts):
        by: dict[str, list[int]] = {}
        for rank, facts in said.items():
            by.setdefault(facts.get(name, "none"), []).append(rank)
        if len(by) > 1:
            found.append(f"{name}: " + ", ".join(f"{text} ({_named(ranks)})" for text, ranks in by.items()))
    return found


def _named(ranks: Sequence[int]) -> str:
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _plain(text: str) -> str:
    """Without addresses, which are others in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
