"""When a step is full, and how many tokens the others compute. Steps are numbered by calls, unless said otherwise."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor

from toca_compile.ir.fields import Checked, Factor, Kind


def periodic_steps(num_steps: int, interval: int, warmup: int = 1) -> tuple[int, ...]:
    """The first ``warmup`` steps and every multiple of the interval."""
    return tuple(i for i in range(num_steps) if i < warmup or i % interval == 0)


def counted_steps(num_steps: int, interval: int, warmup: int = 1, sooner: int = 0) -> tuple[int, ...]:
    """The first ``warmup`` steps, then one full step after every interval − 1 others: for 4 and 3, 0 1 2 6 10 …; the
    first of these ``sooner`` by so many: by 2, 0 1 2 4 8 …"""
    return tuple(i for i in range(num_steps) if i < warmup or (i - warmup + 1 + sooner) % interval == 0)


def spread_steps(num_steps: int, interval: int, bend: float = 1.0, warmup: int = 1) -> tuple[int, ...]:
    """As many full steps as every ``interval``-th would be, from 0 to the last step but one, at (T − 2)·(i/k)^bend:
    evenly for 1, denser towards the end below it. The first ``warmup`` are full too."""
    count = -(-num_steps // interval)
    last = max(num_steps - 2, 0)
    spread = {round(last * (i / (count - 1)) ** bend) for i in range(count)} if count > 1 else {0}
    return tuple(sorted(spread | set(range(min(warmup, num_steps)))))


def end_aligned_steps(num_steps: int, interval: int, warmup: int) -> tuple[int, ...]:
    """The first ``warmup`` steps, and every ``interval``-th counted back from the last but one: the last step is not
    computed, since no later one would use it, and no long gap ends the run. With an interval of 1, all steps."""
    last = num_steps - 1 - (interval > 1 and num_steps > warmup)
    return tuple(sorted({*range(min(warmup, num_steps)), *range(last, -1, -interval)}))


def toca_phases(
    num_steps: int,
    interval: int,
    slope: float,
    sensitive: tuple[float, float],
    sensitive_interval: int,
    count: str = "down",
) -> dict[int, int]:
    """For each value of the counter ``s``, in the order of the calls: s modulo ToCa's interval in force, 0 where the
    step is full.

    Counted ``down`` (DiT), s runs from num_steps − 1 to 0 and I(s) = round(N / (1 + w − 2·w·s/T)); counted ``up``
    (PixArt), from 0 on and I(s) = round(N / (1 − w + 2·w·s/T)). Both are long at the noisy end and short at the other.
    ``sensitive_interval`` holds for s in [⌊aT⌋, ⌊bT⌋). The first step is full. Whenever s is a multiple of the interval
    in force the interval is evaluated anew, and the step is full if s is a multiple of the new one too. Where the
    published code refreshes layer 0 alone (the test is repeated in each layer there), all layers are partial here.
    """
    low, high = floor(sensitive[0] * num_steps), floor(sensitive[1] * num_steps)
    bend = slope if count == "down" else -slope

    def interval_at(s: int) -> int:
        if low <= s < high:
            return sensitive_interval
        weight = float32(1 + bend - 2 * bend * s / num_steps)
        return max(1, round(float32(interval / weight)))

    counter = [counted(call, num_steps, count) for call in range(num_steps)]
    current, phases = interval_at(counter[0]), {counter[0]: 0}
    for s in counter[1:]:
        if s % current == 0:
            current = interval_at(s)
        phases[s] = s % current
    return phases


def counted(call: int, num_steps: int, count: str) -> int:
    """The counter ``s`` at a call, and the call at which the counter is ``s``."""
    return call if count == "up" else num_steps - 1 - call


def float32(x: float) -> float:
    """``x`` rounded to single precision: the published schedules round intervals computed there."""
    value: float = struct.unpack("f", struct.pack("f", x))[0]
    return value


@dataclass(frozen=True)
class RatioSchedule(Checked):
    """Share of tokens recomputed: ρ · layer · step · kind, clamped to [0, 1] (ToCa, section 3.3).

    ``layer`` = (a, b): a + b·l/span with l the block's place in its stack; ``step`` = (a, b): a + b·s/T with s the
    policy's own counter; ``kinds``: a factor for each kind of site, 1 where none is given.
    """

    layer: tuple[Factor, Factor] = (1.0, 0.0)
    step: tuple[Factor, Factor] = (1.0, 0.0)
    kinds: Mapping[Kind, Factor] = field(default_factory=dict)

    def tokens(self, ratio: float, n: int, *, kind: str, layer: tuple[int, int], step: tuple[int, int]) -> int:
        """K = floor(ratio · n) of one site at one step. ``layer``: l and span; ``step``: s and T."""
        (depth, span), (s, num_steps) = layer, step
        by_layer = self.layer[0] + self.layer[1] * (depth / span if span else 0.0)
        by_step = self.step[0] + self.step[1] * s / num_steps
        share = ratio * by_layer * by_step * self.kinds.get(kind, 1.0)
        return floor(min(max(share, 0.0), 1.0) * n)
