"""What the documentation says: links lead somewhere, code runs, numbers are those that were measured."""

import csv
import re
from pathlib import Path

import pytest

import toca_compile
from toca_compile import policies
from toca_compile.policies.given import checked_policy

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    page for folder in (".", "benchmarks", "benchmarks/results", "examples") for page in (ROOT / folder).glob("*.md")
)
NAMES = {name: getattr(toca_compile, name) for name in toca_compile.__all__}


def policy_table() -> list[list[str]]:
    """The cells of the README's rows of policies, without bold face."""
    lines = README.split("## Which policy")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        headings = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings_of(file)] if heading else []
        assert heading in headings or not heading, target


def headings_of(page: Path) -> list[str]:
    return [line.lstrip("#").strip() for line in page.read_text().splitlines() if line.startswith("#")]


def test_numbers_of_the_policy_table_were_measured() -> None:
    measured = {
        (row["FLOPs ×"], row["latency ×"], f"{float(row['PSNR dB']):.1f}", row["cache MB"])
        for name in ("quality", "quality_planned")
        for row in csv.DictReader((ROOT / f"benchmarks/results/{name}.csv").open())
        if row["PSNR dB"]
    }
    rows = policy_table()
    assert len(rows) == 10
    for row in rows:
        assert tuple(row[2:]) in measured, row


def test_policies_of_the_table_are_policies() -> None:
    cells = [re.findall(r"`([^`]+)`", row[0]) for row in policy_table()]
    made = [checked_policy(eval(cell[0], dict(NAMES))) for cell in cells if cell and ".plan(" not in cell[0]]
    assert len(made) == 8


def test_numbers_of_the_text_were_measured() -> None:
    results = "\n".join(page.read_text() for page in (ROOT / "benchmarks/results").glob("*.md"))
    text = README.split("## Four numbers")[1].split("\n## ")[0]
    measured = re.findall(r"\d+(?:\.\d+)?", results)
    rounded = {f"{float(number):.1f}" for number in measured} | set(measured)
    for number in re.findall(r"\d+\.\d+", text):
        assert number in rounded or number == "2.13", number  # torch's version
    assert "2.13.0" in results


def test_every_public_policy_and_configuration_is_told() -> None:
    told = (ROOT / "examples" / "README.md").read_text()
    for name in [*policies.PRESETS, *(n for n in NAMES if isinstance(NAMES[n], type) and hasattr(NAMES[n], "plan"))]:
        assert name in told or f"`-{name.rsplit('-', 1)[-1]}`" in told, name


def test_the_composition_of_the_page_is_one() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    code = re.search(r"`(Composition\(50.*?)`", page, re.S)
    assert code is not None
    names = {name: getattr(policies, name) for name in policies.__all__}
    assert isinstance(checked_policy(eval(" ".join(code[1].split()), names)), policies.Composition)
