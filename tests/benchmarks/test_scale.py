"""The plan on paper says what the roofline's numbers say."""

import json

import pytest
from common import RESULTS
from scale import planned


def test_rates_are_those_of_the_predicted_runs() -> None:
    times = json.loads((RESULTS / "roofline.json").read_text())
    plans = planned()
    assert len(plans) == 4
    title, rows = next((t, r) for t, r in plans.items() if t.startswith("FLUX"))
    assert "50 steps" in title
    name = next(t for t in times if t.startswith("FLUX")).partition(": ")[0]
    (step,) = [row for row in times[f"{name}: predicted steps"] if row["policy"] == "FullCompute"]
    plain, cached = (next(r for r in rows if (r["GPU"], r["policy"]) == ("H100", p)) for p in ("uncached", "50-n4"))
    assert plain["s a sample"] == pytest.approx(50 * step["H100 ms, CUDA graphs"] / 1e3)
    (run,) = [r for r in times[f"{name}: predicted runs"] if (r["GPU"], r["policy"]) == ("H100", "50-n4")]
    speed_up = run["predicted speed-up, CUDA graphs"]
    assert cached["samples / s on 1000"] / plain["samples / s on 1"] == pytest.approx(1000 * speed_up)
    assert (plain["cache GB a request"], plain["bound"]) == (0, "full by products")
    assert cached["cache GB a request"] == pytest.approx(3.23, abs=0.01)
