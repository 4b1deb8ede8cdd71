"""``python -m tests.fuzz --minutes 60``: random models under random policies, held against what must hold of any.

Failures are printed as they come, made small, and written as JSON with code that ``tests/fuzz/test_finds.py`` takes.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.fuzz.campaign import work
from tests.fuzz.grammar import read
from tests.fuzz.oracles import Tally, examine


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first model")
    parser.add_argument("--models", type=int, default=None, help="how many at most")
    parser.add_argument("--policies", type=int, default=4, help="of each model")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--verify", action="store_true", help="with the compiler's own check of partial variants too")
    parser.add_argument("--without", default="", help="words: models whose description has one of them are left out")
    parser.add_argument("--minimise", type=float, default=60.0, help="seconds for each failure, 0: none")
    parser.add_argument("--each", type=int, default=2, help="failures of one kind that are made small")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--spec", type=Path, default=None, help="run one written failure again")
    given = parser.parse_args()
    os.environ["TOCA_VERIFY"] = "1" if given.verify else "0"
    if given.spec is not None:
        kept = json.loads(given.spec.read_text())
        found = examine(read(kept["spec"]), [read(kept["policy"])])
        print("\n".join(map(str, found)) or "nothing fails")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    total = Tally()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
        for tally in pool.map(partial(work, given), range(given.jobs)):
            total.add(tally)
    print(total)


if __name__ == "__main__":
    main()
