"""What one process of ``python -m tests.fuzz`` does."""

import json
import os
import random
import time
from typing import Any

from tests.fuzz.grammar import draw, draw_policy, written
from tests.fuzz.minimise import as_test, minimise
from tests.fuzz.oracles import Tally, Unusable, examine


def work(given: Any, job: int) -> Tally:
    """One process's share: every ``jobs``-th seed, until the time is over."""
    os.environ["TOCA_VERIFY"] = "1" if given.verify else "0"
    tally, end = Tally(), time.monotonic() + 60 * given.minutes
    seeds = range(given.seed + job, given.seed + (given.models or 10**9), given.jobs)
    seen: dict[str, int] = {}
    words = [word for word in given.without.split(",") if word]
    for seed in seeds:
        if time.monotonic() > end:
            break
        spec, r = draw(seed), random.Random(seed)
        policies = [draw_policy(r) for _ in range(given.policies)]
        if any(word in written(spec) for word in words):
            continue
        try:
            failures = examine(spec, policies, tally)
        except Unusable as error:  # a mistake of the grammar: the campaign goes on, and tells it
            tally.unusable += 1
            print(f"seed {seed}: unusable: {error}", flush=True)
            continue
        for number, failure in enumerate(failures):
            print(f"seed {seed}: {failure}", flush=True)
            seen[failure.kind] = seen.get(failure.kind, 0) + 1
            small = spec
            if given.minimise and seen[failure.kind] <= given.each:
                small, failure = minimise(spec, failure, given.minimise)
                print(f"smaller:\n{as_test(small, failure)}\n  {failure.detail}", flush=True)
            told = {"seed": seed, "kind": failure.kind, "detail": failure.detail, "spec": written(small),
                    "policy": written(failure.policy)}  # fmt: skip
            (given.out / f"{seed}-{number}.json").write_text(json.dumps(told, indent=1) + "\n")
    return tally
