"""Engine: continuous batching with caches. Requests come and go at any time; those whose steps are alike share a call
of the model, and whoever is about to compute everything waits a little for the others to be, too."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from toca_compile.errors import TocaError
from toca_compile.ir.plan import Policy
from toca_compile.model import OptimizedModel, unwrapped
from toca_compile.policies.given import checked_policy
from toca_compile.runtime.clock import Clock, device_of
from toca_compile.serving.lane import Followed, Kind, Lane, NoRoom
from toca_compile.serving.requests import Call, Request, Sampling, Ticket, meant
from toca_compile.serving.turns import BatchSession

log = logging.getLogger(__name__)

KINDS = 16
"""Kinds of calls (resolutions, lengths of texts) at work: requests of others wait, and graphs of those that nobody has
asked for are dropped."""
SIZES = (1, 2, 4, 8, 16)
"""Requests in a batch: a group is filled up to the next of these, so that few graphs are compiled."""


@dataclass(eq=False)
class Active:
    """A request that the engine works on. ``call``: the next of the model's; ``held``: ticks that it has waited with a
    step that computes everything."""

    number: int
    ticket: Ticket
    sampling: Sampling
    call: Call
    lane: Lane
    followed: Followed
    slot: int = -1
    step: int = 0
    held: int = 0

    @property
    def is_full(self) -> bool:
        """Whether its next step computes everything."""
        return self.followed.is_full(self.step)


@dataclass(eq=False)
class _Waiting:
    """A request before its first step."""

    number: int
    request: Request
    policy: Policy
    ticket: Ticket
    sampling: Sampling | None = None
    call: Call | None = None


@dataclass
class Statistics:
    """What an engine did. ``samples``: how many requests its model calls were of; ``padded``: how many rows of these
    were nobody's."""

    ticks: int = 0
    calls: int = 0
    samples: int = 0
    padded: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0


class Engine:
    """Samples many requests at once with one model, each with caches of its own.

    Each result is that of the request run alone: where the graph is proved to compute each sample on its own, requests
    share calls; else (a batch norm, an op of which nothing is known) each is computed alone, and a warning names what
    stands in the way. A request that fails or is cancelled leaves the others as they are.

    ``tick()`` and ``run()`` work in the caller's thread; ``with engine:`` works in one of its own and is done with all
    requests when it is left.

    Args:
        model: a diffusion transformer in eval mode, as of ``optimize``. It is not changed.
        policy: as of ``optimize``; fitted to each request's number of steps and guidance.
        memory: bytes that caches may take; requests beyond it wait. None: no limit.
        sizes: of batches, ascending from 1. Of a kind of request as many are at work as the largest holds, or as few as
            are found to have as many done in a second; others wait.
        options: ``lowering`` and ``grid``, as of ``optimize``.

    Attributes:
        statistics: what was done so far.

    Raises:
        TocaError: the model is no module, or a number is none.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | str = "balanced",
        *,
        memory: int | None = None,
        sizes: Sequence[int] = SIZES,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TocaError(
                f"Engine takes a torch.nn.Module, not {type(model).__name__}; of a pipeline its transformer"
            )
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] != 1:
            raise TocaError(f"sizes must ascend from 1, as {SIZES} do, not {sizes!r}")
        if memory is not None and memory < 0:
            raise TocaError(f"memory must be a number of bytes, not {memory!r}")
        if not {"lowering", "grid"} >= options.keys():
            raise TocaError(f"Engine takes lowering and grid of optimize's options, not {', '.join(options)}")
        self._session = BatchSession(policy, **options)
        self._model = OptimizedModel(unwrapped(model), self._session)
        self._model._toca.signatures = (KINDS + 1) * len(sizes)
        self._sizes, self._memory = tuple(sizes), memory
        self._lanes: dict[Kind, Lane] = {}
        self._waiting: deque[_Waiting] = deque()
        self._ready: deque[Active] = deque()  # begun, without a slot
        self._active: list[Active] = []
        self._numbers = count()
        self._lock, self._work = threading.RLock(), threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.statistics = Statistics()

    # -- what users do ------------------------------------------------------------------------------------------------

    def submit(self, request: Request, policy: Policy | str | None = None) -> Ticket:
        """Take a request, from any thread. It begins with a later tick.

        Args:
            policy: of this request; None: the engine's.

        Returns:
            A future of what the request's sampler returns.

        Raises:
            TocaError: the engine is being left.
            PolicyError: ``policy`` is no policy.
        """
        meant = self._session.policy if policy is None else checked_policy(policy)
        if not isinstance(request, Request) or request.num_steps < 1:
            raise TocaError(f"submit takes a Request of at least one step, not {request!r}")
        ticket = Ticket()
        with self._work:
            if self._closing:
                raise TocaError("the engine takes no more requests: it is being closed")
            self._waiting.append(_Waiting(next(self._numbers), request, meant, ticket))
            self._work.notify_all()
        return ticket

    def tick(self) -> int:
        """Take requests one step further, and say how many: those that are not about to compute everything, and the
        others where there are none, or where they have waited for an interval of their policy."""
        with self._lock:
            self._drop_cancelled()
            self._begin()
            self._admit()
            due = self._due()
            for members in self._groups(due):
                self._compute(members)
            self.statistics.ticks += bool(due)
            return len(due)

    def run(self) -> None:
        """Tick until no request is left."""
        while self.pending:
            self.tick()

    def sample(self, requests: Iterable[Request]) -> list[Any]:
        """The results of requests, in order, sampled in this thread.

        Raises:
            Exception: what the first of them failed with.
        """
        tickets = [self.submit(request) for request in requests]
        if self._thread is None:
            self.run()
        return [ticket.result() for ticket in tickets]

    def warm_up(self, request: Request, steps: Iterable[int] = (), policy: Policy | str | None = None) -> None:
        """Trace and compile all that requests like this one may need, in this thread: for each size of batch, and each
        of the numbers of ``steps`` beside its own. The request itself is not sampled."""
        meant = self._session.policy if policy is None else checked_policy(policy)
        with self._lock:
            for number in dict.fromkeys((request.num_steps, *steps)):
                waiting = _Waiting(-1, replace(request, num_steps=number), meant, Ticket())
                active = self._begun(waiting)
                active.sampling.close()
                for size in active.lane.sizes if active.followed.why_apart is None else (1,):
                    active.followed.compile(size)

    @property
    def pending(self) -> int:
        """Requests that are not over."""
        return len(self._waiting) + len(self._ready) + len(self._active)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(lane.bytes for lane in self._lanes.values())

    @property
    def graphs(self) -> int:
        """How often the model was traced: once for each size of batch and kind of call."""
        return self._session.seen

    @property
    def variants(self) -> int:
        """How many variants are compiled."""
        return self._session.compiled

    def __enter__(self) -> "Engine":
        if self._thread is not None:
            raise TocaError("the engine works already: start it once, and submit to it from any thread")
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="toca-engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._work:
            self._closing = True
            self._work.notify_all()
        assert self._thread is not None
        self._thread.join()
        self._thread, self._closing = None, False

    # -- one tick -----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self.pending or self._closing)
                if not self.pending:
                    return
            self.tick()

    def _drop_cancelled(self) -> None:
        for active in [a for a in (*self._active, *self._ready) if a.ticket.cancelled()]:
            self.statistics.cancelled += 1
            self._over(active)

    def _begin(self) -> None:
        """Ask new requests for their first call, and lay their policies out."""
        while self._waiting:
            waiting = self._waiting[0]
            try:
                begun = None if waiting.ticket.cancelled() else self._begun(waiting)
            except NoRoom:
                return  # and whoever came later, too
            except StopIteration as done:  # it needs no model
                self._settle(waiting.ticket, result=done.value)
            except Exception as error:
                self._settle(waiting.ticket, error=error)
            else:
                if begun is not None:
                    self._ready.append(begun)
                else:
                    self.statistics.cancelled += 1
            self._waiting.popleft()

    def _begun(self, waiting: "_Waiting") -> Active:
        request = waiting.request
        if waiting.sampling is None:
            waiting.sampling = request.sampler(request)
            with torch.no_grad():
                waiting.call = _checked(next(waiting.sampling))
        assert waiting.call is not None
        lane = self._lane(waiting.call)
        followed = lane.follow(meant(waiting.policy, request, waiting.call))
        return Active(waiting.number, waiting.ticket, waiting.sampling, waiting.call, lane, followed)

    def _busy(self) -> set[int]:
        """The lanes at work."""
        return {id(a.lane) for a in (*self._active, *self._ready)}

    def _lane(self, call: Call) -> Lane:
        """The requests with calls of its kind."""
        kind = Kind.of(call)
        if kind not in self._lanes:
            busy = self._busy()
            idle = [k for k, lane in self._lanes.items() if id(lane) not in busy]
            if len(self._lanes) >= KINDS and not idle:
                raise NoRoom
            for known in idle[: len(self._lanes) - KINDS + 1]:
                del self._lanes[known]
            self._lanes[kind] = Lane(self._model, self._session, call, self._sizes, (self._memory, self._has_room))
        self._lanes[kind] = self._lanes.pop(kind)  # the last used, last
        return self._lanes[kind]

    def _admit(self) -> None:
        """Give slots to requests in the order in which they came, as far as there is memory. More of a kind than a
        batch holds, or than it pays to compute together, would only keep one another waiting."""
        at_work = Counter(id(active.lane) for active in self._active)
        for first in list(self._ready):
            lane = first.lane
            if at_work[id(lane)] >= lane.costs.at_once(lane.sizes):
                continue
            slot = self._slot(lane)
            if slot is None and self._active:
                return
            self._ready.remove(first)
            if slot is None:  # nobody will give any back
                self._settle(first.ticket, error=TocaError(self._too_large(lane)))
            else:
                first.slot = slot
                self._active.append(first)
                at_work[id(lane)] += 1

    def _due(self) -> list[Active]:
        """Who goes on in a tick. What computes everything costs most: whoever is about to waits until all of its lane
        are, and shares the call with them."""
        ahead = {id(a.lane) for a in self._active if not a.is_full}
        due = []
        for active in self._active:
            if active.is_full and id(active.lane) in ahead and active.held < active.followed.interval:
                active.held += 1
            else:
                active.held = 0
                due.append(active)
        return due

    def _slot(self, lane: Lane) -> int | None:
        if lane.pool.used == lane.pool.size:
            for slots in (max(2 * lane.pool.size, 4), lane.pool.size + 1):
                if self._fits((slots - lane.pool.size) * lane.pool.slot_bytes):
                    lane.pool.grow(slots)
                    break
        return lane.pool.take()

    def _fits(self, more: int) -> bool:
        if self._memory is None or self.cache_bytes + more <= self._memory:
            return True
        busy = self._busy()
        for lane in self._lanes.values():
            if id(lane) not in busy:
                lane.release()
        return self.cache_bytes + more <= self._memory

    def _has_room(self, more: int) -> bool:
        """Whether a policy may be laid out: where nobody works, waiting would not help."""
        return self._fits(more) or not self._busy()

    def _too_large(self, lane: Lane) -> str:
        return (
            f"memory={self._memory} holds no request: its caches are {lane.pool.slot_bytes} bytes, and those of the "
            f"batch that is computed up to {lane.bytes - lane.pool.bytes}; give more, or take smaller sizes"
        )

    def _groups(self, due: Sequence[Active]) -> list[list[Active]]:
        """Requests whose steps are alike, as many as a batch holds."""
        groups: dict[Any, list[Active]] = {}
        for active in due:
            lane, followed = active.lane, active.followed
            apart = active.number if followed.why_apart is not None else None
            key = (id(lane), apart, lane.shared(active.call), followed.moment(active.step))
            groups.setdefault(key, []).append(active)
        return [
            members[i : i + members[0].lane.most]
            for members in groups.values()
            for i in range(0, len(members), members[0].lane.most)
        ]

    def _compute(self, members: Sequence[Active]) -> None:
        lane = members[0].lane
        requests = next(size for size in lane.sizes if size >= len(members))
        call = members[0].call
        clock, full = Clock(device_of(tree_leaves((call.args, call.kwargs)))), members[0].is_full
        try:
            answers = lane.compute(members, requests)
        except Exception as error:
            if len(members) > 1:
                # Whose fault it was, each tells alone: nothing of it was written.
                log.warning("a batch of %d requests failed, each is tried alone: %s", len(members), error)
                for member in members:
                    self._compute([member])
                return
            self._settle(members[0].ticket, error=error)
            self._over(members[0])
            return
        clock.stop()
        if full:
            lane.costs.note(requests, clock)
        self.statistics.calls += 1
        self.statistics.samples += len(members)
        self.statistics.padded += requests - len(members)
        for member, answer in zip(members, answers, strict=True):
            self._advance(member, answer)

    def _advance(self, active: Active, answer: Any) -> None:
        active.step += 1
        active.ticket.steps = active.step
        try:
            with torch.no_grad():
                active.call = _checked(active.sampling.send(answer))
            self._check_going_on(active)
        except StopIteration as done:
            self._settle(active.ticket, result=done.value)
            self._over(active)
        except Exception as error:
            self._settle(active.ticket, error=error)
            self._over(active)

    def _check_going_on(self, active: Active) -> None:
        steps = active.followed.schedule.steps
        if steps is not None and active.step >= steps:
            raise TocaError(f"the sampler makes more than the {steps} model calls that the request's num_steps says")
        if Kind.of(active.call) != active.lane.kind:
            raise TocaError(
                "the sampler calls the model with other shapes, dtypes or numbers than before: a request's calls must "
                "differ in the values of tensors alone"
            )

    def _over(self, active: Active) -> None:
        active.sampling.close()
        if active in self._active:
            self._active.remove(active)
            active.lane.pool.give_back(active.slot)
        elif active in self._ready:
            self._ready.remove(active)

    def _settle(self, ticket: Ticket, *, result: Any = None, error: Exception | None = None) -> None:
        """Say how a request ended; of one that was cancelled meanwhile nobody asks."""
        settled = ticket.settle(result=result, error=error)
        self.statistics.done += settled and error is None
        self.statistics.failed += settled and error is not None
        self.statistics.cancelled += not settled


def _checked(call: Any) -> Call:
    if not isinstance(call, Call):
        raise TocaError(f"a sampler yields model calls, as toca_compile.serving.requests.call makes, not {call!r}")
    return call
