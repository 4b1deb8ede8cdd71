"""What was tried on the way to the policies that ``policies.md`` recommends, row by row: FLOPs and PSNR, eager.

    python benchmarks/tried.py series spread blocks queries published     # any of these; all take about 40 minutes
    python benchmarks/tried.py predictors gates scores storage --models fashion_dit emoji_flux
    python benchmarks/tried.py gates --rows 'EasyCache|SpeCa'                 # those whose name holds one of these

Ten samples of one calibration seed that no result is reported on. Latency is not measured here. ``results/tried.md``
has the rows.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trained import TRAINED

import toca_compile
from toca_compile import BlockCache, Composition, DuCa, MagCache, TaylorSeer, TaylorToCa, ToCa
from toca_compile.policies import (
    Bands,
    DiCache,
    EasyCache,
    EndAligned,
    MeanVelocity,
    Rule,
    SeaCache,
    SkipBlocks,
    SpeCa,
    TeaCache,
)
from toca_compile.policies.anchors import Anchors, Chebyshev, Dmd, Foca, Hermite, Polynomial, Taylor
from toca_compile.policies.schedules import end_aligned_steps
from toca_compile.quality.calibration import channel_rules
from toca_compile.quality.evaluation import Sampler
from toca_compile.quality.metrics import psnr

Row = tuple[str, Any]


def series(steps: int) -> Iterator[Row]:
    """Forecasts of every site: the published recursion against Newton's polynomial."""
    for n in (2, 3, 4, 5):
        for basis, orders in (("taylor", (2, 3, 4)), ("newton", (2, 3, 4))):
            for order in orders:
                yield f"every site, {basis} o{order}, N={n}", TaylorSeer(steps, n, order, basis=basis)


def spread(steps: int) -> Iterator[Row]:
    """The same with full steps laid up to the last but one."""
    for n in (2, 3, 4, 5):
        for basis, order in (("taylor", 2), ("newton", 2), ("newton", 3)):
            for bend in (1.0, 0.9, 0.8):
                policy = TaylorSeer(steps, n, order, schedule="spread", bend=bend, basis=basis)
                yield f"every site, {basis} o{order}, N={n}, spread, bend {bend}", policy


def blocks(steps: int) -> Iterator[Row]:
    """What all blocks add to the stream, as one."""
    for n in (2, 3, 4, 5):
        for order in (2, 3):
            yield f"blocks, newton o{order}, N={n}", BlockCache(steps, 0, interval=n, order=order, basis="newton")
        yield f"all but the first block, reused, N={n}", BlockCache(steps, 1, interval=n)
        policy = BlockCache(steps, 1, interval=n, order=2, basis="newton", bend=0.9)
        yield f"all but the first block, newton o2, N={n}, spread, bend 0.9", policy
    for bend in (1.0, 0.9, 0.8, 1.1):
        policy = BlockCache(steps, 0, interval=5, order=3, basis="newton", bend=bend)
        yield f"blocks, newton o3, N=5, spread, bend {bend}", policy


def queries(steps: int) -> Iterator[Row]:
    """Tokens recomputed between full steps, Taylor o2, N=5; their new values kept or not."""
    yield "no token", TaylorSeer(steps, 5, 2)
    for update in (False, True):
        for keys, mlp in (("fresh", False), ("fresh", True), ("update", False), (None, True)):
            for share in (0.1, 0.3, 0.6):
                for score in ("error", "random"):
                    policy = TaylorToCa(steps, 5, 2, share, score=score, keys=keys, mlp=mlp, update=update)
                    what = f"queries with keys {keys}" * (keys is not None) + " and " * bool(keys and mlp) + "MLP" * mlp
                    yield f"{what}, {share:.0%} by {score}{', kept' if update else ''}", policy


def published(steps: int) -> Iterator[Row]:
    """DuCa, and block caches that a test at run time drives."""
    for n in (3, 5):
        yield f"DuCa N={n}", DuCa(steps, n)
    for threshold in (0.03, 0.06, 0.1, 0.2):
        for order in (0, 2):
            policy = BlockCache(steps, 1, threshold=threshold, order=order, basis="newton", warmup=2)
            yield f"first block {threshold}, {'newton o2' if order else 'reused'}", policy


def predictors(steps: int) -> Iterator[Row]:
    """What all blocks add to the stream, forecast by each published rule, with full steps counted from the end."""
    rules = {
        "reused": (Polynomial(), 1), "line": (Polynomial(), 2), "newton o2": (Polynomial(), 3),
        "newton o3": (Polynomial(), 4), "taylor o2 (TaylorSeer)": (Taylor(), 3), "HiCache o2": (Hermite(), 3),
        "FoCa": (Foca(), 3), "Spectrum": (Chebyshev(), 6), "Spectrum, half a line": (Chebyshev(local=0.5), 6),
        "DMD": (Dmd(), 6),
    }  # fmt: skip
    for n in (2, 3, 5):
        for name, (weights, anchors) in rules.items():
            rule = Rule(SkipBlocks(do=Anchors(weights, anchors)))
            yield f"{name}, N={n}", Composition(steps, EndAligned(n, 2), (rule,)).for_run(steps, False)
        for span in (2, 4):
            rule = Rule(SkipBlocks(do=Anchors(MeanVelocity(span), 4)))
            yield f"MeanCache K={span}, N={n}", Composition(steps, EndAligned(n, 2), (rule,)).for_run(steps, False)
        for cutoff in (0.125, 0.25, 0.5):
            rule = Rule(SkipBlocks(do=Bands(Hermite(), 3, cutoff)))
            yield f"FreqCa {cutoff:g}, N={n}", Composition(steps, EndAligned(n, 2), (rule,))
        groups = channel_rules(*_trained(steps), end_aligned_steps(steps, n, 2), steps=steps, seeds=(100,), samples=4)
        yield f"HyCa, N={n}", Composition(steps, EndAligned(n, 2), (Rule(SkipBlocks(do=Anchors(groups, 3))),))


def gates(steps: int) -> Iterator[Row]:
    """What says when a step is full: the first block's change, its input (TeaCache), what of that is picture (SeaCache,
    by σ = 1 − step / steps, which is true of the FLUX alone), its rate (EasyCache), the first block's output (DiCache),
    the last one's (SpeCa), a curve of magnitudes (MagCache, the model's own)."""
    for threshold in (0.05, 0.1, 0.2, 0.4):
        for order in (0, 1):
            what = "forecast by a line" if order else "reused"
            yield f"first block {threshold}, {what}", BlockCache(steps, 1, threshold=threshold, order=order)
            yield f"TeaCache {threshold}, {what}", TeaCache(steps, threshold, order=order)
            yield f"SeaCache {threshold}, {what}", SeaCache(steps, threshold, order=order)
            yield f"EasyCache {threshold}, {what}", EasyCache(steps, threshold, 3, order=order)
        yield f"DiCache {threshold}", DiCache(steps, threshold, retention=0.1)
        for order in (1, 2):
            yield f"SpeCa {threshold}, taylor o{order}", SpeCa(steps, threshold, order=order, limit=None)
    ratios = toca_compile.magnitudes(*_trained(steps), steps=steps, seeds=(100,), samples=4)
    for threshold, limit in ((0.03, 2), (0.06, 3), (0.12, 4), (0.24, 5)):
        for order in (0, 1):
            what = "forecast by a line" if order else "reused"
            yield f"MagCache {threshold}, K={limit}, {what}", MagCache(steps, ratios, threshold, limit, order=order)


def scores(steps: int) -> Iterator[Row]:
    """ToCa's score by all queries and by some, and no score."""
    for ratio in (0.1, 0.3):
        yield f"ToCa N=3, {ratio:.0%} by random", ToCa(steps, 3, ratio, schedule="constant", score="random")
        for stride in (1, 4, 8, 16):
            policy = ToCa(steps, 3, ratio, schedule="constant", score_stride=stride)
            yield f"ToCa N=3, {ratio:.0%} by every {stride}. query" if stride > 1 else f"ToCa N=3, {ratio:.0%}", policy


def storage(steps: int) -> Iterator[Row]:
    """In which dtype caches lie."""
    policies = {
        "tokens": ToCa(steps, 3, 0.1),
        "every site, newton o2, N=3": TaylorSeer(steps, 3, 2, basis="newton"),
        "blocks, newton o2, N=3": BlockCache(steps, 0, interval=3, order=2, basis="newton"),
    }
    for name, policy in policies.items():
        for dtype in (None, "bfloat16", "float8_e4m3fn", "float8_e5m2"):
            yield f"{name}, in {dtype or 'float32'}", replace(policy, cache_dtype=dtype)


def _trained(steps: int) -> tuple[Any, Sampler]:
    return next(t for t in TRAINED.values() if t.steps == steps).load()


GROUPS = {f.__name__: f for f in (series, spread, blocks, queries, published, predictors, gates, scores, storage)}


def main() -> None:
    """Sample with every row of the groups asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=list(GROUPS))
    parser.add_argument("--models", choices=list(TRAINED), nargs="+", default=["fashion_dit"])
    parser.add_argument("--rows", default="", help="a pattern that a row's name must hold")
    given = parser.parse_args()
    for trained in (TRAINED[name] for name in given.models):
        model, sampler = trained.load()
        steps = trained.steps
        reference = sampler(model, steps, 100, 10)
        opt = toca_compile.optimize(model, TaylorSeer(steps, 2, 2), lowering="eager")
        for name in given.groups:
            print(f"\n## {name}: {trained.title}, {steps} steps\n")
            print("| policy | FLOPs × | PSNR dB | caches MB |\n| --- | --- | --- | --- |")
            for row, policy in GROUPS[name](steps):
                if not re.search(given.rows, row):
                    continue
                opt.policy = policy
                samples = sampler(opt, steps, 100, 10)
                report = toca_compile.explain(opt)
                told = f"{report.flop_speedup():.2f} | {psnr(samples, reference):.2f} | {report.cache_bytes / 1e6:.1f}"
                print(f"| {row} | {told} |", flush=True)


if __name__ == "__main__":
    main()
