"""Labels beside the points of a picture, so that none covers another label, a point or the edge."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, dist, pi, sin
from typing import Any

_GAP = 5.0  # pixels between a point and its label, and half the side of what is kept free around a point
_RINGS = 14
_DIRECTIONS = 24


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    width: float
    height: float

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        high = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(wide, 0.0) * max(high, 0.0)


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, drawn: Sequence[Box] = ()
) -> list[Box]:
    """A box of its size for each point, as near to it as there is room: rings of growing radius are searched, the
    right-hand side first. Where the frame is too full for a free place, the one that covers least is taken. ``drawn``:
    what else must not be covered."""
    taken = [*drawn, *(Box(x - _GAP, y - _GAP, 2 * _GAP, 2 * _GAP) for x, y in points)]
    boxes: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best, least = None, float("inf")
        for candidate in _around(x, y, width, height):
            outside = width * height - candidate.overlap(frame)
            covered = outside + sum(candidate.overlap(other) for other in taken)
            if covered < least - 1e-6:
                best, least = candidate, covered
            if least < 1e-6:
                break
        assert best is not None
        boxes.append(best)
        taken.append(best)
    return boxes


def _around(x: float, y: float, width: float, height: float) -> list[Box]:
    """Places for a box that a point at its edge looks at, the nearest first."""
    angles = sorted((2 * pi * i / _DIRECTIONS for i in range(_DIRECTIONS)), key=lambda a: -cos(a) - 0.1 * sin(a))
    return [
        # The box is centred beyond the ring by its own half sizes, so that its edge, not its middle, lies on the ring.
        Box(x + (r + width / 2) * cos(a) - width / 2, y + (r + height / 2) * sin(a) - height / 2, width, height)
        for r in (_GAP * (1.4 + 1.2 * ring) for ring in range(_RINGS))
        for a in angles
    ]


def label(
    axis: Any, points: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]] = (), size: float = 7.0
) -> None:
    """Write each point's text beside it, with a thin line to it where they are apart; none on the ``line`` that the
    picture shows. Limits and layout of the axis are final from here on.

    Args:
        axis: of matplotlib, drawn with a backend for pictures (Agg).
        points: x, y and text, as data.
        line: its corners, as data.
        size: of the letters, in points.
    """
    axis.set_xlim(axis.get_xlim())
    axis.set_ylim(axis.get_ylim())
    renderer = axis.figure.canvas.get_renderer()
    texts = [axis.text(x, y, text, fontsize=size, va="bottom", zorder=3) for x, y, text in points]
    extents = [text.get_window_extent(renderer) for text in texts]
    frame = axis.get_window_extent(renderer)

    def pixels(x: float, y: float) -> tuple[float, float]:
        right, up = axis.transData.transform((x, y))
        return float(right), float(up)

    at = [pixels(x, y) for x, y, _ in points]
    boxes = place(
        at, [(e.width, e.height) for e in extents], Box(frame.x0, frame.y0, frame.width, frame.height),
        _along([pixels(*corner) for corner in line]),
    )  # fmt: skip
    to_data = axis.transData.inverted().transform
    for text, (x, y), box in zip(texts, at, boxes, strict=True):
        text.set_position(to_data((box.left, box.bottom)))
        near = min(max(x, box.left), box.left + box.width), min(max(y, box.bottom), box.bottom + box.height)
        if dist((x, y), near) > 3 * _GAP:
            ends = to_data([(x, y), near])
            axis.plot(ends[:, 0], ends[:, 1], color="0.6", linewidth=0.5, zorder=1)


def _along(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes that cover a line."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(dist((x0, y0), (x1, y1)) / 2))
        boxes += [Box(x0 + (x1 - x0) * i / steps - 1, y0 + (y1 - y0) * i / steps - 1, 2, 2) for i in range(steps + 1)]
    return boxes
