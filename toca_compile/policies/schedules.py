"""When a step is full, and how many tokens the others compute. Steps count calls from 0 unless said otherwise."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor


def constant_steps(num_steps: int, interval: int) -> tuple[int, ...]:
    """Full steps 0, N, 2N, …"""
    return tuple(range(0, num_steps, interval))


def toca_steps(
    num_steps: int, interval: int, slope: float, sensitive: tuple[float, float], sensitive_interval: int
) -> tuple[int, ...]:
    """Full steps of ToCa's interval function, in the paper's own count ``s`` (num_steps − 1 first, 0 last).

    I(s) = round(N / (1 + w − 2·w·s/T)): long at the noisy end, short at the other; ``sensitive_interval`` for s in
    [⌊aT⌋, ⌊bT⌋). The first step is full. Whenever s is a multiple of the interval in force the interval is evaluated
    anew, and the step is full if s is a multiple of the new one too. Where the published code refreshes layer 0 alone
    (the test is repeated in each layer there), all layers are partial here.
    """
    low, high = floor(sensitive[0] * num_steps), floor(sensitive[1] * num_steps)

    def interval_at(s: int) -> int:
        if low <= s < high:
            return sensitive_interval
        weight = float32(1 + slope - 2 * slope * s / num_steps)
        return max(1, round(float32(interval / weight)))

    first = num_steps - 1
    current, full = interval_at(first), [first]
    for s in range(first - 1, -1, -1):
        if s % current == 0:
            current = interval_at(s)
            if s % current == 0:
                full.append(s)
    return tuple(full)


def float32(x: float) -> float:
    """``x`` rounded to single precision: the published schedules round intervals computed there."""
    value: float = struct.unpack("f", struct.pack("f", x))[0]
    return value


@dataclass(frozen=True)
class RatioSchedule:
    """Share of tokens recomputed: ρ · layer · step · kind, clamped to [0, 1] (ToCa, section 3.3).

    ``layer`` = (a, b): a + b·l/span with l the block's place in its stack; ``step`` = (a, b): a + b·s/T with s counting
    down as in the paper; ``kinds``: a factor for each kind of site, 1 where none is given.
    """

    layer: tuple[float, float] = (1.0, 0.0)
    step: tuple[float, float] = (1.0, 0.0)
    kinds: Mapping[str, float] = field(default_factory=dict)

    def tokens(self, ratio: float, n: int, *, kind: str, depth: int, span: int, s: int, num_steps: int) -> int:
        """K = floor(ratio · n) of one site at one step."""
        layer = self.layer[0] + self.layer[1] * (depth / span if span else 0.0)
        step = self.step[0] + self.step[1] * s / num_steps
        share = ratio * layer * step * self.kinds.get(kind, 1.0)
        return floor(min(max(share, 0.0), 1.0) * n)
