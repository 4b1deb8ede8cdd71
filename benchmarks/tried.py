"""What was tried on the way to the policies that ``policies.md`` recommends: one group of rows, eager, PSNR and FLOPs.

    python benchmarks/tried.py series spread blocks queries published      # any of these; all take about ten minutes

Ten samples of one calibration seed that no result is reported on (spread over seeds: 0.3 to 0.8 dB, see
``results/quality.md``). Latency is not measured here. Writes ``results/tried-GROUP.md``.
"""

import argparse
from pathlib import Path
from typing import Any

from common import RESULTS, hardware
from rich.console import Console

from toca_compile import BlockCache, Composition, DuCa, TaylorSeer, TaylorToCa, demo, preset
from toca_compile.evaluation import evaluate
from toca_compile.policies import Every, Rule, SkipBlocks


def groups() -> dict[str, dict[str, Any]]:
    """The rows of each group."""
    series = {
        f"{basis} o{order} N={n}": TaylorSeer(50, n, order, basis=basis)
        for n in (2, 3, 5)
        for basis, orders in (("taylor", (2, 4)), ("newton", (2, 3, 4)))
        for order in orders
    }
    spread = {
        f"newton o3 N={n} spread, bend {bend}": TaylorSeer(50, n, 3, schedule="spread", bend=bend, basis="newton")
        for n in (3, 5)
        for bend in (1.0, 0.8)
    }
    blocks: dict[str, Any] = {}
    for n in (3, 5):
        blocks[f"blocks N={n} newton o2"] = BlockCache(50, 0, interval=n, order=2, basis="newton")
        blocks[f"blocks N={n} reused"] = BlockCache(50, 0, interval=n)
        blocks[f"blocks N={n} newton o2, first block computed"] = BlockCache(
            50, 1, interval=n, order=2, basis="newton"
        )  # fmt: skip
        blocks[f"blocks N={n} newton o2, spread, bend 0.9"] = BlockCache(
            50, 0, interval=n, order=2, basis="newton", bend=0.9
        )  # fmt: skip
        state = Rule(SkipBlocks(residual=False, order=2))
        blocks[f"blocks N={n} newton o2, of the stream itself"] = Composition(50, Every(n), (state,), basis="newton")
    queries: dict[str, Any] = {"taylor o2 N=5": TaylorSeer(50, 5, 2)}
    cases: tuple[tuple[str, dict[str, Any], float], ...] = (
        ("mlp", {}, 0.1),
        ("queries, fresh keys", {"keys": "fresh", "mlp": False}, 0.3),
        ("queries, fresh keys", {"keys": "fresh", "mlp": False}, 0.6),
        ("queries, keys updated", {"keys": "update", "mlp": False}, 0.3),
        ("queries, keys kept", {"keys": "keep", "mlp": False}, 0.3),
        ("queries and mlp, fresh keys", {"keys": "fresh"}, 0.3),
    )
    for what, settings, share in cases:
        for score in ("error", "random"):
            policy = TaylorToCa(50, 5, 2, share, score=score, update=False, **settings)
            queries[f"{what}, {share:.0%} by {score}"] = policy
    for what, settings, share in cases[:2]:
        policy = TaylorToCa(50, 5, 2, share, score="random", **settings)
        queries[f"{what}, {share:.0%} by random, differences updated"] = policy
    published: dict[str, Any] = {
        "ToCa": preset("dit-xl-2/ddim-50"),
        "ToCa random": preset("dit-xl-2/ddim-50", score="random"),
    }
    published |= {f"DuCa N={n}": DuCa(50, n) for n in (3, 5)}
    published |= {
        f"first block {t}, {'newton o2' if o else 'reused'}": BlockCache(
            50, 1, threshold=t, order=o, basis="newton", warmup=2
        )
        for t in (0.03, 0.1)
        for o in (0, 2)
    }
    return {"series": series, "spread": spread, "blocks": blocks, "queries": queries, "published": published}


def main() -> None:
    """Evaluate the groups asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=list(groups()))
    parser.add_argument("--out", type=Path, default=Path("toca-tried"))
    given = parser.parse_args()
    model, sampler = demo.model_and_sampler()
    for name in given.groups:
        results = evaluate(
            model, sampler, groups()[name], fewer=(), seeds=(100,), samples=10, batch=10, out=given.out,
            lowering="eager", console=Console(),
        )  # fmt: skip
        rows = sorted(results[1:], key=lambda r: (round(r.flop_speedup, 1), r.mean_psnr))
        lines = [f"| {r.name} | {r.flop_speedup:.2f} | {r.mean_psnr:.2f} |" for r in rows]
        text = "\n".join(["| policy | FLOPs × | PSNR dB |", "| --- | --- | --- |", *lines])
        (RESULTS / f"tried-{name}.md").write_text(f"# tried: {name}\n\n{hardware()}, eager.\n\n{text}\n")


if __name__ == "__main__":
    main()
