"""Sight: what the host can see of a model call, and what that says of the call: is it the next step of a sampling,
another guidance pass of the same step, or the first step of another sampling?

Nothing here waits for an accelerator. What decides, in this order: what the caller tells (``cache_context``), the
denoising time where it is a host value, the latents, and the other inputs by value or identity. Each rule errs towards
a new sampling, which computes everything: a wrong guess costs time, never a wrong picture.
"""

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from types import MappingProxyType
from typing import Any

import torch

NOTHING: Mapping[Any, Any] = MappingProxyType({})
_SIGNAL = 256  # elements of a host tensor that is read as numbers
_COPIED = 1 << 22  # elements of a host tensor that is compared by value

_BACK = 0.5  # a return of more than this share of the last step is no noise added by the sampler
_GAP = 3.5  # a step this many times longer than any before leaves some out (quadratic schedules reach 3)
_LANES = 64  # pictures sampled in turns at most
_TRIES = 3  # calls at one time, each with other latents, after which what was taken for the time is none
_JUMP = 0.3  # 1 − cosine of the latents of two neighbouring steps, where others were five times closer


class Verdict(Enum):
    """What a call is to the call before it."""

    NEXT = "the next step"
    PASS = "another call at the same step: a guidance pass, or a picture that is sampled beside"
    NEW = "the first step of another sampling"


@dataclass(frozen=True)
class Told:
    """What the caller says of a step, as diffusers' pipelines do."""

    step_index: int | None = None
    num_inference_steps: int | None = None
    time: float | None = None

    @classmethod
    def of(
        cls, step_index: Any = None, num_inference_steps: Any = None, timestep: Any = None, sigma: Any = None
    ) -> Any:
        """Host values among what was told; None where there are none."""
        times = [x for x in (number(timestep), number(sigma)) if x is not None]
        index, steps = number(step_index), number(num_inference_steps)
        told = cls(
            None if index is None else int(index), None if steps is None else int(steps), times[0] if times else None
        )
        return None if told == cls() else told


@dataclass(frozen=True)
class Seen:
    """One tensor: which object, changed how often; and its values, where they are the host's."""

    ref: "weakref.ref[torch.Tensor]"
    version: int | None
    shape: tuple[int, ...]
    floating: bool
    copy: torch.Tensor | None
    hollow: bool  # on meta there are no values to differ

    @classmethod
    def of(cls, value: torch.Tensor) -> "Seen":
        """As the tensor is now."""
        version = None if value.is_inference() else value._version
        copy = value.detach().clone() if on_host(value) and value.numel() <= _COPIED else None
        return cls(weakref.ref(value), version, tuple(value.shape), value.is_floating_point(), copy, value.is_meta)

    def shows(self, value: torch.Tensor) -> bool:
        """Whether a tensor has the values that were seen, as far as the host has them."""
        copy = self.copy
        if copy is None or not on_host(value) or copy.shape != value.shape or copy.dtype != value.dtype:
            return False
        return torch.equal(copy, value)

    def same(self, now: "Seen") -> bool:
        """Whether two sights are of the same values."""
        if self is now:
            return True
        if self.shape != now.shape:
            return False
        if self.copy is not None and now.copy is not None:
            return torch.equal(self.copy, now.copy)
        return self.hollow or (self.ref() is not None and self.ref() is now.ref() and self.version == now.version)


@dataclass
class Sight:
    """What the host sees of one call.

    Attributes:
        graph: the graph that it reached first.
        clock: the inputs that the analysis knows as the denoising time; None where there are none, or they are not the
            host's (``hidden``).
        signals: small host inputs, by argument; those that are floating-point, and those that are tensors.
        tensors: the others.
        told: what the caller said.
    """

    graph: int
    clock: tuple[float, ...] | None
    signals: dict[Any, tuple[float, ...]] = field(default_factory=dict)
    floats: set[Any] = field(default_factory=set)
    arrays: set[Any] = field(default_factory=set)
    hidden: bool = False
    tensors: dict[Any, Seen] = field(default_factory=dict)
    told: Told | None = None
    lane: tuple[int, int] = (0, 0)  # which of the pictures that are sampled in turns, and which pass of it

    @classmethod
    def of(
        cls,
        graph: int,
        clock: Sequence[Any],
        inputs: Mapping[Any, Any],
        told: Told | None,
        before: Mapping[Any, Seen] = NOTHING,
    ) -> "Sight":
        """Look at a call's inputs. ``before``: what was seen in the call before, of which most stays as it is."""
        sight = cls(graph, read(clock), told=told)
        if told is not None and told.time is not None:
            sight.clock = (told.time,)
        sight.hidden = bool(clock) and sight.clock is None
        if told is not None and told.step_index is not None:
            return sight  # there is nothing to find out
        times = {id(x) for x in clock}
        for key, value in inputs.items():
            if id(value) in times and isinstance(value, torch.Tensor):
                continue
            is_tensor = isinstance(value, torch.Tensor)
            if is_tensor and not _is_signal(value):
                known = before.get(key)
                sight.tensors[key] = known if known is not None and known.shows(value) else Seen.of(value)
                continue
            numbers = _numbers(value)
            if numbers is not None:
                sight.signals[key] = numbers
                if is_tensor:
                    sight.arrays.add(key)
                if value.is_floating_point() if is_tensor else isinstance(value, float):
                    sight.floats.add(key)
        return sight


class Watch:
    """The calls of one context, as they come. ``judge`` says of each what it is to the one before.

    Args:
        directions: which way each clock runs, as learnt from earlier samplings of the model (shared, written to).
    """

    def __init__(self, directions: dict[Any, float]) -> None:
        self.directions = directions
        self.outputs: list[tuple[int, ...]] = []  # shapes of what the model yields: its latents look like that
        self.time_is_visible = True
        self.why = ""  # of the last new sampling
        self.blind = False  # what was taken for the time turned out not to be
        self.doubt = False  # whether the next step may be of the sampling before
        self.restart()

    def restart(self) -> None:
        """Another sampling begins."""
        self.group: list[Sight] = []  # the calls of the current step
        self.previous: list[Sight] = []  # and of the one before
        self.steps = 0
        self.last: dict[Any, float] = {}  # of each clock, the last step forward
        self.longest: dict[Any, float] = {}
        self.moving: set[Any] = set()  # signals that change from step to step
        self.repeats = False  # a second-order sampler asks twice at one time
        self.drift = 0.0
        self.lanes = 1

    def judge(self, now: Sight) -> Verdict:
        """What this call is, and take note of it: then ``now.lane`` says whose."""
        verdict = self._judge(now) if self.group else Verdict.NEW
        if verdict is Verdict.NEW:
            self.restart()
        if now.told is None or now.told.step_index is None:
            self._recognise(now, *((self.previous, self.group) if verdict is Verdict.PASS else (self.group, ())))
        if verdict is Verdict.PASS:
            self.group.append(now)
        else:
            self.previous, self.group = self.group, [now]
            self.steps += 1
        return verdict

    def _judge(self, now: Sight) -> Verdict:
        before = self.group[-1]
        told = _by_telling(before.told, now.told)
        if told is not None:
            self.why = "the caller said so"
            now.lane = (0, before.lane[1] + 1) if told is Verdict.PASS else (0, 0)
            return told
        latents = self._latents(now)
        if latents in before.tensors and before.tensors[latents].shape != now.tensors[latents].shape:
            return self._new("the latents have another shape")
        same = latents in before.tensors and before.tensors[latents].same(now.tensors[latents])
        times = self._times(before, now)
        self.time_is_visible = times is not None
        moved = {k: (a, b) for k, (a, b) in (times or {}).items() if a != b}
        if same and not moved:
            return self._pass(now) if self._is_other(before, now, latents) else self._next(now, latents)
        if times is None:
            return self._next(now, latents)
        if not moved:
            if self._is_second_order(before, now, latents):
                return self._next(now, latents)
            return self._beside(now, latents)
        if same and now.clock is None and not self.moving and not moved.keys() & now.floats:
            # Of two small integers one may be the time and one a label: the same latents speak for the label.
            return self._pass(now)
        return self._step(now, moved, latents)

    def _pass(self, now: Sight) -> Verdict:
        """The same latents once more."""
        lane, number = self.group[-1].lane
        now.lane = (lane, number + 1)
        return Verdict.PASS

    def _recognise(self, now: Sight, before: Sequence[Sight], beside: Sequence[Sight]) -> None:
        """Which pass a call is, if those of the step before (``before``) are told by tensors: they may come in another
        order, or without the first. ``beside``: the calls of this step so far."""
        lane, number = now.lane
        passes = {sight.lane[1]: sight for sight in before if sight.lane[0] == lane}
        if passes.keys() <= {number}:
            return
        latents, taken = self._latents(now), {sight.lane[1] for sight in beside if sight.lane[0] == lane}
        alike = [n for n, sight in passes.items() if n not in taken and _is_told_alike(sight, now, latents)]
        if alike and number not in alike:
            now.lane = (lane, alike[0])
        elif not alike and (number in taken or number > len(taken)):  # those before it came in another order
            now.lane = (lane, next(n for n in count() if n not in taken))

    def _beside(self, now: Sight, latents: Any) -> Verdict:
        """Other latents at the same time: another picture, sampled beside or instead. The next step will tell which by
        whose latents it has; where they cannot be compared, all that is known is that what was kept is not theirs."""
        if _copies(self.group[-1], now, latents) is None:
            self.doubt = True
            return self._new("the same timestep came with other latents")
        taken = {sight.lane[0] for sight in self.group}
        known = [sight for sight in self.previous if sight.lane[0] not in taken]
        lane = self._nearest(known, now, latents)
        if lane is None:
            lane, self.lanes = self.lanes, self.lanes + 1
        if now.clock is None and self.steps == 1 and self.lanes > _TRIES:
            self.blind = True
            return self._new("no input that the host sees is the time")
        if self.lanes > _LANES:
            return self._new("too many pictures are sampled in turns")
        now.lane = (lane, 0)
        return Verdict.PASS

    def _next(self, now: Sight, latents: Any) -> Verdict:
        lane = self._nearest(self.group, now, latents)
        now.lane = (self.group[0].lane[0] if lane is None else lane, 0)
        return Verdict.NEXT

    def _nearest(self, sights: Sequence[Sight], now: Sight, latents: Any) -> int | None:
        """The lane whose latents are like these; None where there is none to choose."""
        lanes = {sight.lane[0] for sight in sights}
        if len(lanes) == 1:
            return lanes.pop()
        away: dict[int, float] = {}
        for sight in sights:
            pair = _copies(sight, now, latents)
            if pair is not None:
                away.setdefault(sight.lane[0], _distance(*pair))
        return min(away, key=lambda lane: away[lane]) if away else None

    def _new(self, why: str) -> Verdict:
        self.why = why
        return Verdict.NEW

    def _step(self, now: Sight, moved: Mapping[Any, tuple[float, float]], latents: Any) -> Verdict:
        """The time moved: on, back, or too far; or the picture is another one."""
        if self.doubt:
            self.doubt = False
            return self._new("the same timestep came with other latents, and these may be of either sampling")
        for key, (a, b) in moved.items():
            step, way = b - a, self.directions.get(key, 0.0)
            if way and step * way < 0:
                if self.steps == 1:
                    del self.directions[key]  # learnt from earlier samplings, and perhaps another way round now
                if abs(step) > _BACK * self.last.get(key, 0.0):
                    return self._new("the timestep jumped back")
            elif key in self.longest and abs(step) > _GAP * self.longest[key]:
                return self._new("the timestep left steps out")
        self._next(now, latents)
        first = next(sight for sight in self.group if sight.lane[0] == now.lane[0])
        if self._is_other_picture(first, now):
            return self._new("a small input changed that had stayed the same (labels?)")
        if self._jumps(first, now, latents):
            return self._new("the latents have nothing to do with those of the step before")
        if now.clock is None:
            self.moving |= set(moved)
        for key, (a, b) in moved.items():
            if (b - a) * self.directions.setdefault(key, 1.0 if b > a else -1.0) > 0:
                self.last[key] = abs(b - a)
                self.longest[key] = max(abs(b - a), self.longest.get(key, 0.0))
        return Verdict.NEXT

    def _times(self, before: Sight, now: Sight) -> dict[Any, tuple[float, float]] | None:
        """The clocks at both calls; None where no time is visible."""
        if now.clock is not None and before.clock is not None and len(now.clock) == len(before.clock):
            return dict(enumerate(zip(before.clock, now.clock, strict=True)))
        if now.hidden or self.blind:
            return None
        # No clock was found in the graph: a small input that is alike for the whole batch may be one. Numbers of Python
        # that never change (a guidance scale) say nothing of the time.
        alike = {k: (before.signals[k][0], v[0]) for k, v in now.signals.items() if _uniform(v) and k in before.signals}
        if self.moving:
            return {k: alike[k] for k in self.moving if k in alike} or None
        return {
            k: pair for k, pair in alike.items() if k in now.arrays or (k in now.floats and pair[0] != pair[1])
        } or None

    def _latents(self, now: Sight) -> Any:
        """Which input is the picture: it has the shape of the output but for one dimension; else the first tensor."""
        floating = [k for k, seen in now.tensors.items() if seen.floating]
        for key in floating:
            shape = now.tensors[key].shape
            if any(
                len(o) == len(shape) and sum(a != b for a, b in zip(o, shape, strict=True)) <= 1 for o in self.outputs
            ):
                return key
        return floating[0] if floating else None

    def _is_other(self, before: Sight, now: Sight, latents: Any) -> bool:
        """Whether the same latents at the same time come with other conditioning."""
        if before.graph != now.graph or before.tensors.keys() != now.tensors.keys():
            return True
        if before.signals != now.signals:
            return True
        return any(not before.tensors[k].same(now.tensors[k]) for k in now.tensors if k != latents)

    def _is_other_picture(self, first: Sight, now: Sight) -> bool:
        """Whether a small input changed that stays as it is during a sampling (labels)."""
        changed = [k for k, v in now.signals.items() if k not in self.moving and first.signals.get(k, v) != v]
        if now.clock is None:
            return self.steps > 1 and bool(changed)
        # At the first step what is alike for the whole batch may be the time in another form.
        settled = [k for k in changed if self.steps > 1 or (k not in now.floats and not _uniform(now.signals[k]))]
        if not settled:
            self.moving |= set(changed)
        return bool(settled)

    def _is_second_order(self, before: Sight, now: Sight, latents: Any) -> bool:
        """Whether the sampler asks twice at one time (Heun), with corrected latents. It never does at the first."""
        if self.steps < 2:
            return False
        pair = _copies(before, now, latents)
        if pair is not None:
            near = bool((pair[1] - pair[0]).norm() <= 0.5 * pair[0].norm())
        else:
            near = self.repeats or self.steps == 2
        self.repeats |= near
        return near

    def _jumps(self, first: Sight, now: Sight, latents: Any) -> bool:
        """Whether the latents have nothing to do with those of the step before, where until now they had."""
        pair = _copies(first, now, latents)
        if pair is None:
            return False
        away = _distance(*pair)
        jumps = 1e-6 < 5 * self.drift < away and away > _JUMP
        self.drift = max(self.drift, away)
        return jumps


def _is_told_alike(a: Sight, b: Sight, latents: Any) -> bool:
    """Whether two calls have the same tensors beside the picture."""
    keys = a.tensors.keys() - {latents}
    return keys == b.tensors.keys() - {latents} and all(a.tensors[k].same(b.tensors[k]) for k in keys)


def _by_telling(before: Told | None, now: Told | None) -> Verdict | None:
    """What the caller's own step numbers say; None where there are none."""
    if now is None or now.step_index is None:
        return None if before is None or before.step_index is None else Verdict.NEW
    if before is None or before.step_index is None or before.num_inference_steps != now.num_inference_steps:
        return Verdict.NEW
    passed = now.step_index - before.step_index
    return {0: Verdict.PASS, 1: Verdict.NEXT}.get(passed, Verdict.NEW)


def _copies(a: Sight, b: Sight, key: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    if key is None or key not in a.tensors or key not in b.tensors:
        return None
    x, y = a.tensors[key].copy, b.tensors[key].copy
    return (x.float(), y.float()) if x is not None and y is not None and x.shape == y.shape else None


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 − cosine of two tensors."""
    a, b = a.flatten(), b.flatten()
    norms = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return 1 - float(a @ b) / norms if norms > 0 else 0.0


def _uniform(values: Sequence[float]) -> bool:
    return bool(values) and all(v == values[0] for v in values)


def _is_signal(value: torch.Tensor) -> bool:
    """Few numbers in a row, a timestep or a label for each sample: pictures have more dimensions."""
    return on_host(value) and value.numel() <= _SIGNAL and sum(s != 1 for s in value.shape) <= 1


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is one piece of memory, no subclass or sparse layout."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided


def on_host(value: torch.Tensor) -> bool:
    """Whether a tensor's values can be read without waiting."""
    return is_plain(value) and value.device.type == "cpu"


def _numbers(value: Any) -> tuple[float, ...] | None:
    """A small host tensor or a Python number as numbers."""
    if isinstance(value, (bool, int, float)):
        return (float(value),)
    if isinstance(value, torch.Tensor) and not value.is_complex():
        return tuple(map(float, value.reshape(-1).tolist()))
    return None


def number(value: Any) -> float | None:
    """The mean of a host value; None where it is no number, or reading it would make the host wait."""
    if isinstance(value, torch.Tensor):
        if not on_host(value) or not value.numel() or value.numel() > 4096 or value.is_complex():
            return None
        numbers = value.reshape(-1).tolist()  # for the few that they are, faster than an op
        return float(sum(numbers)) / len(numbers)
    return float(value) if isinstance(value, (int, float)) else None


def read(clock: Iterable[Any]) -> tuple[float, ...] | None:
    """The clock's values, a mean each (frames may have times of their own); None where they are not the host's."""
    values = [number(value) for value in clock]
    return tuple(v for v in values if v is not None) if values and None not in values else None
