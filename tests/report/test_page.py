"""The report as a page: self-contained, and alive in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import ToCa, TocaError
from toca_compile.report.page import Shown

BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opt = toca_compile.optimize(randomize(PlainDiT(depth=3)), ToCa(6, 3, 0.3, schedule="constant"), lowering="eager")
    sample(opt, 6, noise())
    path = tmp_path_factory.mktemp("page") / "report.html"
    tokens = [torch.arange(16) / 16 * (i % 2) for i in range(6)]
    shown = Shown(torch.rand(1, 8, 8) * 2 - 1, tokens, (4, 4), {"</script>": [0.0, 0.1, 0.2, 0.2, 0.3, 0.1]})
    toca_compile.explain(opt).save(path, shown)
    return path


def test_it_holds_all_and_asks_for_nothing(saved: Path) -> None:
    text = saved.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert "%DATA%" not in text
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data = json.loads(found)
    (graph,) = data["graphs"]
    assert len(graph["steps"]) == 6
    assert all(len(step["actions"]) == len(graph["sites"]) == 6 for step in graph["steps"])
    assert graph["steps"][0]["flops"] == graph["full"] > graph["steps"][1]["flops"]
    assert data["policy"]["policy"] == "ToCa"
    assert data["shown"]["picture"].startswith("data:image/png;base64,")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_it_runs_in_a_browser_and_the_slider_moves(saved: Path, tmp_path: Path) -> None:
    """The page's own scripts run without an error, and a step chosen by the slider is another map."""
    probe = """<script>
      window.addEventListener("load", () => setTimeout(() => {
        const map = document.getElementById("map"), slider = document.getElementById("step");
        const before = map.toDataURL(), said = document.getElementById("told").textContent;
        slider.value = 1; slider.dispatchEvent(new Event("input"));
        document.title = JSON.stringify({ changed: before !== map.toDataURL(), said: said !== document.getElementById("told").textContent,
          boxes: document.querySelectorAll("rect[data-step]").length, errors: window.failures });
      }, 300));
    </script></body>"""
    early = (
        '<script>window.failures = []; window.onerror = (m) => window.failures.push(m);</script><meta charset="utf-8">'
    )
    text = saved.read_text(encoding="utf-8").replace("</body>", probe).replace('<meta charset="utf-8">', early, 1)
    page = tmp_path / "probe.html"
    page.write_text(text, encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.findall(r"<title>(.*?)</title>", done.stdout)[0]  # the others are those of boxes
    told = json.loads(title.replace("&quot;", '"'))
    assert told == {"changed": True, "said": True, "boxes": 36, "errors": []}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TocaError, match="picture must be"):
        Shown(torch.zeros(8, 8))
    with pytest.raises(TocaError, match=r"tokens must be \[16\]"):
        Shown(tokens=[torch.zeros(15)], grid=(4, 4))
    opt = toca_compile.optimize(PlainDiT(depth=1), lowering="eager")
    with pytest.raises(TocaError, match="cannot be written"):
        toca_compile.explain(opt).save(tmp_path / "no" / "report.html")
    toca_compile.explain(opt).save(tmp_path / "early.html")
    assert "Nothing is compiled yet" in (tmp_path / "early.html").read_text(encoding="utf-8")
