"""One idea, one spelling: what a site does in a step is asked of its action, and told apart nowhere else."""

import re
from pathlib import Path

import pytest

from toca_compile.ir.actions import Action

ROOT = Path(__file__).resolve().parents[2]
OWN = {"toca_compile/ir/actions.py", "toca_compile/ir/anchors.py"}
SOURCES = sorted([*(ROOT / "toca_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
KINDS = "|".join(Action.members)
COMPARED = [
    rf"isinstance\([^)]*\b({KINDS})\b",
    rf"\b(is|is not|==|!=) ({KINDS})\b",
    rf"case ({KINDS})\(",
    r"\.word (==|!=|in) ",
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_compares_with_an_action(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    if name in OWN or name.startswith("passes/variants/"):
        return
    for pattern in COMPARED:
        found = re.search(pattern, path.read_text())
        assert found is None, f"{name}: {found and found.group(0)}"
