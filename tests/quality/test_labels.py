"""Labels of pictures cover nothing."""

import csv
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toca_compile.quality.evaluation import Result, _plot
from toca_compile.quality.labels import Box, place

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FRAME = Box(0, 0, 800, 600)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 800), st.integers(0, 600)), max_size=12))
def test_labels_cover_neither_each_other_nor_a_point_nor_the_edge(points: list[tuple[int, int]]) -> None:
    boxes = place(points, [(90.0, 10.0)] * len(points), FRAME)
    for box, other in combinations(boxes, 2):
        assert box.overlap(other) == 0
    for box in boxes:
        assert box.overlap(FRAME) == pytest.approx(900)
        assert all(box.overlap(Box(x - 1, y - 1, 2, 2)) == 0 for x, y in points)


def test_a_full_frame_still_has_a_place_for_each() -> None:
    assert len(place([(5, 5)] * 30, [(90.0, 10.0)] * 30, Box(0, 0, 100, 20))) == 30


def test_the_front_of_all_measured_rows_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader((RESULTS / "quality.csv").open()))
    results = [
        Result(row["policy"], float(row["FLOPs ×"]), float(row["latency ×"]), [float(row["PSNR dB"])])
        for row in rows
        if row["PSNR dB"]
    ]
    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    _plot(results, tmp_path / "front.png")
    for axis in figures[0].axes:
        extents = [text.get_window_extent() for text in axis.texts]
        assert len(extents) == len(results)
        boxes = [Box(e.x0, e.y0, e.width, e.height) for e in extents]
        assert max(a.overlap(b) for a, b in combinations(boxes, 2)) < 1e-3
