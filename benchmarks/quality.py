"""Quality against FLOPs on the shipped Fashion-MNIST DiT: PSNR to the uncached samples, mean and spread over seeds.

    python benchmarks/quality.py            # 3 seeds × 16 samples, about 10 minutes on 2 cores

DDIM-50, guidance 1.5; the rewritten graphs run without Inductor, since no time is measured here. The rows "k steps" are
the uncached model with fewer steps. Results go to ``benchmarks/results/quality.{json,md}``.
"""

import argparse
import statistics
from typing import Any

import torch
from common import save

import toca_compile
from toca_compile import Fora, TaylorSeer, preset
from toca_compile.compare import psnr
from toca_compile.demo import default_model, load, sample

POLICIES: dict[str, Any] = {
    **{f"FORA N={n}": Fora(50, n) for n in (2, 3, 4, 5)},
    **{f"ToCa ddim-50, N={n}": preset("dit-xl-2/ddim-50", interval=n) for n in (3, 5)},
    **{f"TaylorSeer order 2, N={n}": TaylorSeer(50, n, 2) for n in (2, 3, 4, 5, 6)},
    **{f"spread, Taylor order 2, N={n}": TaylorSeer(50, n, 2, schedule="spread") for n in (3, 4, 5)},
    **{
        f"spread, Newton order 3, bend 0.8, N={n}": TaylorSeer(50, n, 3, schedule="spread", basis="newton", bend=0.8)
        for n in (2, 3, 4, 5)
    },
}


def main() -> None:
    """Sample with every policy from the same seeds and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    model, scheduler = load(default_model())
    labels = torch.arange(given.samples) % 10

    def runs(net: Any, steps: int = 50) -> list[torch.Tensor]:
        return [sample(net, scheduler, labels, steps, seed=s) for s in range(given.seeds)]

    reference, rows = runs(model), []

    def row(name: str, flops: float, samples: list[torch.Tensor]) -> None:
        found = [psnr(a, b) for a, b in zip(samples, reference, strict=True)]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        rows.append(
            {"policy": name, "FLOPs ×": flops, "PSNR dB": round(statistics.mean(found), 2), "± over seeds": spread}
        )
        print(rows[-1], flush=True)

    for steps in (25, 17, 13, 10):
        row(f"{steps} steps, uncached", 50 / steps, runs(model, steps))
    opt = toca_compile.optimize(model, POLICIES["FORA N=2"], lowering="eager")
    for name, policy in POLICIES.items():
        opt.policy = policy
        samples = runs(opt)
        row(name, toca_compile.explain(opt).flop_speedup(), samples)
    save("quality", "cpu", {"Fashion-MNIST DiT, DDIM-50": sorted(rows, key=lambda r: (r["FLOPs ×"], r["PSNR dB"]))})


if __name__ == "__main__":
    main()
