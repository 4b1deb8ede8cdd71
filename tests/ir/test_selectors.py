"""How tokens are selected is asked of the selector; its fields are known to it and to its emission."""

import dataclasses
import re
from pathlib import Path

import pytest

import toca_compile.policies  # noqa: F401  (registers its selectors)
from toca_compile.ir.selectors import Selector, TokenSelector

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "toca_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
OWN = {"toca_compile/ir/selectors.py", "passes/variants/rank.py", "passes/variants/measure_scores.py"}
OWN |= {"toca_compile/policies/clusca.py", "passes/variants/clusters.py"}
KINDS = "|".join(TokenSelector.members)
FIELDS = "|".join({f.name for cls in TokenSelector.members.values() for f in dataclasses.fields(cls)} | {"rule"})
COMPARED = [
    rf"isinstance\([^)]*\b({KINDS})\b",
    rf"\b(is|is not|==|!=) ({KINDS})\b",
    rf"\b(selector|which)\.({FIELDS})\b",
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_compares_with_a_selector(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for pattern in COMPARED if name not in OWN else ():
        found = re.search(pattern, path.read_text())
        assert found is None, f"{name}: {found and found.group(0)}"


def test_without_guidance_the_halves_of_a_batch_are_apart() -> None:
    which = Selector(shared_pair=True)
    assert (which.for_run(guided=True).paired, which.for_run(guided=False).paired) == (True, False)
    assert not TokenSelector().for_run(guided=True).paired
