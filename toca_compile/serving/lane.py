"""Lane: requests whose model calls are of one kind (shapes, dtypes, numbers), and the graphs for batches of them."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from toca_compile.errors import PolicyError, TocaError, UnsupportedGraphError
from toca_compile.ir.factors import Factor
from toca_compile.ir.history import Numbers
from toca_compile.ir.plan import Plan, Policy
from toca_compile.ir.state import State
from toca_compile.ir.types import Site
from toca_compile.passes.proof.samples import sample_factor, samples_in
from toca_compile.runtime.cache_state import like_buffer
from toca_compile.runtime.schedule import Schedule
from toca_compile.serving.costs import Costs
from toca_compile.serving.pool import Key, Name, Place, Pool, Stored
from toca_compile.serving.requests import Call
from toca_compile.serving.turns import BatchSession, Inputs, LaidOut, Turn, Turned

Memory = tuple[int | None, Callable[[int], bool]]  # the limit in bytes, and whether there is room for so many more
_FOLLOWED = 64  # policies that stay laid out: one for each number of steps
_SHARED = 64  # tensors that are the same for a whole batch


@dataclass(frozen=True)
class Kind:
    """What calls must have in common to share one: how many samples each is of, and its arguments but for their
    values. Of a tensor: whether its first dimension is the samples, shape, dtype and device."""

    rows: int
    tree: Any
    leaves: tuple[Hashable, ...]

    @classmethod
    def of(cls, call: Call) -> "Kind":
        """The kind of a call.

        Raises:
            TocaError: it holds no tensor that could tell how many samples it is of.
        """
        leaves, tree = pytree.tree_flatten((call.args, dict(call.kwargs)))
        rows = next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()), 0)
        if not rows:
            raise TocaError("a model call must hold a tensor whose first dimension is the samples that it is of")
        return cls(rows, tree, tuple(_told(x, rows) for x in leaves))

    @property
    def own(self) -> tuple[int, ...]:
        """Which arguments belong to one request: tensors of its samples."""
        return tuple(i for i, leaf in enumerate(self.leaves) if isinstance(leaf, tuple) and leaf[0] is True)


def _told(value: Any, rows: int) -> Hashable:
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape[0] == rows, tuple(value.shape), value.dtype, value.device
    if isinstance(value, (bool, int, float, str, type(None))):
        return type(value).__name__, value
    return "object", id(value)  # which the lane holds, so that no other gets its number


@dataclass(frozen=True)
class _Shared:
    """Tensors that are the same for a whole batch: the objects, how often they were written, and what they hold."""

    objects: tuple[Any, ...]
    versions: tuple[int | None, ...]
    values: tuple[Tensor, ...]
    number: int

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], number: int) -> "_Shared":
        objects = tuple(weakref.ref(x) for x in tensors)
        return cls(objects, tuple(map(_version, tensors)), tuple(x.clone() for x in tensors), number)

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the same; what an accelerator holds is only compared where the objects are others."""
        seen = zip(self.objects, self.versions, tensors, strict=True)
        if all(known() is x and version is not None and version == _version(x) for known, version, x in seen):
            return True
        return all(torch.equal(a, b) for a, b in zip(self.values, tensors, strict=True))


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


class NoRoom(Exception):
    """It must wait until others are done."""


class Member(Protocol):
    """A request as its lane sees it. ``step``: which it is about to do; ``slot``: of the lane's pool."""

    call: Call
    step: int
    slot: int
    followed: "Followed"


class Followed:
    """A policy as the requests of a lane follow it, laid out for each size of batch that was met.

    Attributes:
        schedule: for one request.
        stored: what a slot holds.
        why_apart: why its requests cannot be computed in batches; None where they can.

    Raises:
        PolicyError: the model cannot follow the policy, or it decides for a batch as a whole.
    """

    def __init__(self, lane: "Lane", policy: Policy) -> None:
        self._lane, self.policy = lane, policy
        alone = lane.graphed(1)
        self._laid = {1: alone.executor.laid_out(lane.session.planned(policy, alone.executor))}
        self.schedule: Schedule = self._laid[1].schedule
        why = _of_a_batch(self.schedule.plan)
        if why is not None:
            raise PolicyError(f"{policy} {why}, and requests must not know of one another: take another policy")
        likes = _likes(alone, self.schedule)
        self.stored = {name: self._stored(name, like) for name, like in likes.items()}
        self.why_apart = lane.why_apart
        if self.why_apart is None and lane.most > 1:
            self.why_apart = self._unplaced(likes)
        if self.why_apart is not None:
            lane.session.warn_once(f"requests are computed one by one, not in batches: {self.why_apart}")
        self._moments: dict[int, int] = {}
        self._numbers: dict[tuple[int, int], Numbers] = {}
        lane.hold(self.stored.items())
        for name, like in likes.items():
            self._laid[1].use(name, lane.working(name, like, self.stored[name]))

    def _stored(self, name: Name, like: Tensor) -> Stored:
        kind, index, which = name
        history, ring = self.schedule.keeps[index].history, 1
        if kind is State.HISTORY and which == 1 and history is not None:
            _, ring = history.turned(self.schedule.past(0, self.schedule.owners[index]))
        return Stored(like.numel(), like.dtype, like.device, self._lane.kind.rows, ring, kind is State.STAMP)

    def _unplaced(self, likes: dict[Name, Tensor]) -> str | None:
        """Why slots cannot be gathered into the buffers of a batch."""
        several = self._lane.sizes[1]
        pair = self._lane.graphed(several)
        schedule = pair.executor.laid_out(self._lane.session.planned(self.policy, pair.executor)).schedule
        both = _likes(pair, schedule)
        for name, like in likes.items():
            batch = both.get(name)
            if batch is None or batch.numel() != several * like.numel() or pair.place(name, batch, schedule) is None:
                return f"what is kept of {self.schedule.owners[name[1]].name} does not tell the samples apart"
        if schedule.range is not None and schedule.plan.skip.memory.by_value and pair.executor.factor is None:
            return "the numbers of a forecast cannot be told for each sample"
        return None if both.keys() == likes.keys() else "the policy means another plan for a batch than for one sample"

    def moment(self, step: int) -> int:
        """What it has in common with the steps of other requests of the lane that may be computed with it."""
        if step not in self._moments:
            self._moments[step] = self._lane.moment(self.schedule, step)
        return self._moments[step]

    def numbers(self, step: int, turned: int) -> Numbers:
        """Those of what leaves skipped blocks, at a step, in a ring that is turned so far."""
        if (step, turned) not in self._numbers:
            self._numbers[step, turned] = self.schedule.passed(step, turned)
        return self._numbers[step, turned]

    def ring(self, step: int) -> int:
        """How far the ring of that is turned."""
        schedule = self.schedule
        assert schedule.range is not None
        return schedule.plan.skip.memory.turned(schedule.past(step, schedule.range.owners[0]))[0]

    @cached_property
    def _full(self) -> tuple[bool, ...]:
        # Asked of each request at each tick, and a row is as long as the model is deep.
        return tuple(all(action.dense for action in row) for row in self.schedule.rows)

    @cached_property
    def interval(self) -> int:
        """The most steps from one that computes everything to the next."""
        full = [step for step, computed in enumerate(self._full) if computed]
        return max((b - a for a, b in pairwise(full)), default=1)

    def is_full(self, step: int) -> bool:
        """Whether a step computes everything."""
        return self._full[min(step, len(self._full) - 1)]

    def laid(self, requests: int) -> LaidOut:
        """The plan for a batch of so many."""
        if requests not in self._laid:
            graphed = self._lane.graphed(requests)
            laid = graphed.executor.laid_out(self._lane.session.planned(self.policy, graphed.executor))
            for name, like in _likes(graphed, laid.schedule).items():
                laid.use(name, self._lane.working(name, like, self.stored[name]))
            self._laid[requests] = laid
        return self._laid[requests]

    def compile(self, requests: int) -> None:
        """Compile all variants that its steps need for a batch of so many."""
        laid = self.laid(requests)
        for step in range(len(self.schedule.rows)):
            laid.touched(step)

    def turned(self, name: Name, step: int) -> int:
        """What tells the stamps or the ring of a request from those of another at a like step."""
        stored, (_, index, _) = self.stored[name], name
        if not stored.stamp and stored.ring == 1:
            return 0
        past, history = self.schedule.past(step, self.schedule.owners[index]), self.schedule.keeps[index].history
        return past.since if stored.stamp else history.turned(past)[0] if history is not None else 0


class Graphed:
    """The graph of a batch of so many requests. ``factor``: numbers its samples, where they can be told apart."""

    def __init__(self, executor: Turned, factor: Factor | None) -> None:
        self.executor, self.factor = executor, factor
        executor.tell_apart(factor)

    def place(self, name: Name, like: Tensor, schedule: Schedule) -> Place | None:
        """Where the samples lie in a buffer; None where they do not, or are none."""
        kind, index, which = name
        owner, types = schedule.owners[index], self.executor.program.types
        assert types is not None
        if self.factor is None:
            return None
        if isinstance(owner, Site) and kind in (State.STAMP, State.SCORE):
            found = samples_in((types.factors.resolve(owner.batch),), self.factor, types)
            return None if found is None else Place(*found)
        node: fx.Node = owner.output
        if isinstance(owner, Site) and kind is State.STALE_INPUT and owner.row_proof is not None:
            node = owner.row_proof.stale_inputs[which]
        elif isinstance(owner, Site) and kind is State.KEYS and owner.query_proof is not None:
            node = owner.query_proof.dense_inputs[which]
        dims = types.type_of(node)
        found = samples_in(dims, self.factor, types)
        # The places of a ring stand in front.
        return None if found is None else Place(found[0] + like.dim() - len(dims), found[1])


class Lane:
    """Requests of one kind, and all that they share.

    Attributes:
        kind: of their calls.
        pool: their caches.
        sizes: of batches, in requests.
        why_apart: why each must be computed alone; None where they may share calls.
        costs: what batches took.
    """

    def __init__(
        self, model: Callable[..., Any], session: BatchSession, call: Call, sizes: Sequence[int], memory: Memory
    ) -> None:
        self.kind, self.session, self.pool, self.sizes = Kind.of(call), session, Pool(), tuple(sizes)
        self.costs = Costs()
        self._memory, self._has_room = memory
        self._model, self._example = model, call
        self._graphs: dict[int, Graphed] = {}
        self._followed: OrderedDict[int, Followed] = OrderedDict()
        self._working: dict[Key, Tensor] = {}
        self._shared: list[_Shared] = []
        self._met = count()
        self._moments: dict[Hashable, int] = {}
        self.why_apart: str | None = None
        types = self.graphed(1).executor.program.types
        if types is not None and types.groups:
            raise TocaError(
                "several processes share the model, and an engine in each would take requests in an order of its own "
                "and wait for the others for ever: call the model itself with a batch, in all of them"
            )
        if self.most > 1:
            self.graphed(self.sizes[1])  # tells whether there may be batches at all

    @property
    def most(self) -> int:
        """Requests in a batch."""
        return self.sizes[-1]

    def hold(self, keys: Iterable[Key]) -> None:
        """Let slots hold these buffers too. No more requests are taken into a batch than leave half of the memory to
        others, which wait for their next step.

        Raises:
            NoRoom: there is no memory for that now.
        """
        keys = list(keys)
        new = [key for key in keys if not self.pool.holds(key)]
        slot = self.pool.slot_bytes + sum(stored.bytes for _, stored in new)
        if self._memory is not None and not self._working:
            fits = [size for size in self.sizes if 2 * size * slot <= self._memory]
            self.sizes = tuple(fits) or self.sizes[:1]
        if not self._has_room(sum(stored.bytes for _, stored in new) * (self.pool.size + self.most)):
            raise NoRoom
        self.pool.declare(keys)  # room may have been made by forgetting what nobody used here

    def release(self) -> None:
        """Free the memory of caches; no request may be at work. What is compiled stays."""
        self.pool.clear()
        self._working.clear()
        self._followed.clear()

    @property
    def bytes(self) -> int:
        """Bytes of the caches of all slots, and of the batch that is computed."""
        return self.pool.bytes + sum(t.numel() * t.element_size() for t in self._working.values())

    def graphed(self, requests: int) -> Graphed:
        """The graph for a batch of so many, traced when it is first asked for."""
        if requests not in self._graphs:
            self._graphs[requests] = self._traced(requests)
        return self._graphs[requests]

    def follow(self, policy: Policy) -> Followed:
        """A policy, laid out once.

        Raises:
            PolicyError: as ``Followed``.
        """
        key, known = next(((k, f) for k, f in self._followed.items() if f.policy == policy), (0, None))
        if known is None:
            known = Followed(self, policy)
            key = id(known)
            self._followed[key] = known
            if len(self._followed) > _FOLLOWED:
                self._followed.popitem(last=False)
        self._followed.move_to_end(key)
        return known

    def working(self, name: Name, like: Tensor, stored: Stored) -> Tensor:
        """A buffer in which a batch is computed. Those of all sizes lie in the same memory."""
        key = name, stored
        if key not in self._working:
            with torch.inference_mode(False):
                self._working[key] = torch.zeros(self.most * stored.numbers, dtype=stored.dtype, device=stored.device)
        return self._working[key][: like.numel()].view(like.shape)

    def shared(self, call: Call) -> Hashable:
        """What is equal for calls whose tensors for a whole batch are the same."""
        own = set(self.kind.own)
        leaves = _leaves(call)
        found = tuple(x for i, x in enumerate(leaves) if i not in own and isinstance(x, Tensor))
        if not found:
            return None
        known = next((s for s in reversed(self._shared) if s.holds(found)), None)
        if known is None:
            known = _Shared.of(found, next(self._met))
            self._shared = [*self._shared[1 - _SHARED :], known]
        return known.number

    def moment(self, schedule: Schedule, step: int) -> int:
        """A number for what like steps have in common."""
        return self._moments.setdefault(schedule.moment(step), len(self._moments))

    def compute(self, members: Sequence[Member], requests: int) -> list[Any]:
        """The model's answers to the calls of members whose steps are of one moment, in a batch of ``requests``. Their
        caches are written when all is computed: after an exception they are as they were."""
        leader, kind = members[0], self.kind
        filled = [*members, *[members[-1]] * (requests - len(members))]
        laid, graphed = leader.followed.laid(requests), self.graphed(requests)

        def step(executor: Turned, inputs: Inputs) -> Any:
            if executor is not graphed.executor:
                raise UnsupportedGraphError(
                    "the model was traced again while requests were on their way: its hooks, or torch's modes "
                    "(autocast), have changed"
                )
            moved = []
            for name, buffer, use in laid.touched(leader.step):
                place = graphed.place(name, buffer, laid.schedule)
                apart = buffer.view(1, -1) if place is None else place.by_request(buffer, requests, kind.rows)
                own = leader.followed.turned(name, leader.step)
                turns = [m.followed.turned(name, m.step) - own for m in filled]
                slots = torch.tensor([m.slot for m in filled], device=buffer.device)
                key = name, leader.followed.stored[name]
                if use.read:
                    self.pool.gather(key, apart, slots, turns)
                if use.written:
                    moved.append((key, apart[: len(members)], slots[: len(members)], turns[: len(members)]))
            numbers = None
            if executor.factor is not None and laid.schedule.range is not None:
                turned = leader.followed.ring(leader.step)
                numbers = executor.numbers([m.followed.numbers(m.step, turned) for m in filled], kind.rows)
            answer = laid.step(leader.step, inputs, numbers)
            for written in moved:
                self.pool.scatter(*written)
            return answer

        answer = self._take(Turn(step), self._joined([m.call for m in filled]))
        return self._separated(answer, len(members), requests)

    def _traced(self, requests: int) -> Graphed:
        # No two arguments are one object, so that the graph's inputs tell which argument they are.
        example = pytree.tree_map_only(Tensor, lambda x: x.clone(), (self._example.args, dict(self._example.kwargs)))
        call = self._joined([Call(*example)] * requests)
        turn = Turn()
        self._take(turn, call)
        (executor, inputs), *_ = turn.graphs
        if self.kind.rows * requests == 1:
            return Graphed(executor, None)
        leaves = _leaves(call)
        batched = executor.placeholders_of(inputs, [leaves[i] for i in self.kind.own])
        found = sample_factor(executor.program, batched) if batched else "the graph reads nothing of the samples"
        if requests > 1 and self.why_apart is None:
            same = isinstance(found, int)
            self.why_apart = self._unlike(executor) if same else f"a batch {found}"
        return Graphed(executor, found if isinstance(found, int) else None)

    def _unlike(self, executor: Turned) -> str | None:
        """Why a batch's graph does not do for each sample what that of one request does."""
        told = [
            [(s.name, s.kind, s.axis.size, s.row_proof is None, s.query_proof is None) for s in program.sites]
            + [len(program.segments)]
            for program in (self.graphed(1).executor.program, executor.program)
        ]
        return None if told[0] == told[1] else "the model does something else with a batch than with one sample"

    def _take(self, turn: Turn, call: Call) -> Any:
        control = self.session.control
        control.turn = turn
        try:
            with torch.inference_mode(False), torch.no_grad():
                answer = self._model(*call.args, **call.kwargs)
        finally:
            control.turn = None
        if self.session.broken or len(turn.graphs) != 1:
            raise UnsupportedGraphError(self.session.split() or "torch.compile made no one graph of the model")
        return answer

    def _joined(self, calls: Sequence[Call]) -> Call:
        """One call of several: of arguments that belong to a request the first samples of all, then the second."""
        leaves = [_leaves(call) for call in calls]
        own = set(self.kind.own)
        with torch.inference_mode(False), torch.no_grad():
            joined = [
                torch.stack(column, 1).flatten(0, 1) if i in own else _plain(column[0])
                for i, column in enumerate(zip(*leaves, strict=True))
            ]
        return Call(*pytree.tree_unflatten(joined, self.kind.tree))

    def _separated(self, answer: Any, count: int, requests: int) -> list[Any]:
        """What a batch's answer says to each of the first ``count`` requests."""
        if requests == 1:
            return [answer]
        leaves, tree = pytree.tree_flatten(answer)
        if not all(isinstance(x, (Tensor, bool, int, float, str, type(None))) for x in leaves):
            raise UnsupportedGraphError(f"the model answers with {type(answer).__name__}, which holds no plain tensors")
        samples = self.kind.rows * requests
        apart = [
            x.unflatten(0, (self.kind.rows, requests)) if isinstance(x, Tensor) and x.dim() and len(x) == samples else x
            for x in leaves
        ]
        return [
            pytree.tree_unflatten([a[:, i] if a is not x else x for a, x in zip(apart, leaves, strict=True)], tree)
            for i in range(count)
        ]


def _plain(value: Any) -> Any:
    """A tensor as every request may have it: graphs are traced for strides, and for no inference tensors."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.contiguous()


def _leaves(call: Call) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return leaves


def _likes(graphed: Graphed, schedule: Schedule) -> dict[Name, Tensor]:
    """Fake tensors like the buffers that live from step to step."""
    return {
        (kind, of.index, index): like_buffer(
            kind, index, of, schedule.keeps[of.index], graphed.executor.program, schedule.plan.selector
        )
        for kind, index, of in schedule.kept()
    }


def _of_a_batch(plan: Plan) -> str | None:
    """What a plan does with a batch as a whole; None where each sample is treated on its own."""
    histories = [keep.history for keep in map(plan.keep, range(len(plan.does)))]
    if any(h is not None and not h.by_sample for h in (*histories, plan.skip.memory)):
        return "forecasts by weights that follow from the values of a whole batch"
    return "decides at run time, for a whole batch, whether blocks are computed" if plan.adaptive else None
