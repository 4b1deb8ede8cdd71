"""What moved between two result files of the benchmarks, beyond noise.

    python benchmarks/compare.py OLD.json NEW.json [--noise 0.05]

Rows are the same where their section and all that is no measurement agree. A number has moved if it changed by more
than the noise: the larger of what the two files tell (how far repeats of one call lay apart) and 3 %, twice, since both
files have it. Exits with 1 where something moved.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEAST_NOISE = 0.03
# Words in the names of columns that describe a row, though they hold numbers.
DESCRIBES = ("tokens", "width", "depth", "K/n", "steps", "target", "batch", "interval", "order", "stride", "blocks")

Row = dict[str, Any]


def key_of(section: str, row: Row) -> tuple[str, ...]:
    """What tells a row from the others of a file."""
    given = (f"{name}={value}" for name, value in row.items() if not is_measured(name, value))
    return section, *given


def is_measured(name: str, value: Any) -> bool:
    """Whether a column holds a measurement."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and not set(name.split()) & set(DESCRIBES)


def rows_of(results: dict[str, Any]) -> dict[tuple[str, ...], Row]:
    """The rows of a file by what tells them apart."""
    sections = {name: rows for name, rows in results.items() if isinstance(rows, list)}
    return {key_of(name, row): row for name, rows in sections.items() for row in rows}


def moved(old: dict[str, Any], new: dict[str, Any], noise: float) -> Iterator[str]:
    """A line for each number that changed by more than ``noise``, and for each row that only one file has."""
    before, after = rows_of(old), rows_of(new)
    for key in [*before, *(key for key in after if key not in before)]:
        name = " ".join(key)
        if key not in after or key not in before:
            yield f"{name}: only in the {'old' if key in before else 'new'} file"
            continue
        for column, was in before[key].items():
            now = after[key].get(column)
            if not is_measured(column, was) or not is_measured(column, now):
                continue
            if abs(now - was) > noise * abs(was):
                change = f" ({now / was - 1:+.1%})" if was else ""
                yield f"{name}: {column} {was:.4g} → {now:.4g}{change}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a file of benchmarks/results")
    parser.add_argument("new", type=Path, help="the same benchmark's, measured later")
    parser.add_argument("--noise", type=float, help="relative change that is none (default: twice what the files tell)")
    given = parser.parse_args(arguments)
    try:
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (given.old, given.new))
    except (OSError, ValueError) as error:
        parser.error(f"no result file: {error}")
    noise = given.noise
    if noise is None:
        noise = 2 * max(LEAST_NOISE, old.get("noise", 0.0), new.get("noise", 0.0))
    if old.get("hardware") != new.get("hardware"):
        print(f"other hardware: {old.get('hardware')} | {new.get('hardware')}; only ratios can be compared")
    lines = list(moved(old, new, noise))
    print("\n".join(lines) or f"nothing moved by more than {noise:.1%}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
