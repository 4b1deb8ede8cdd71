"""Times that GPUs should need, predicted from what they would launch; nothing here is measured.

    python benchmarks/roofline.py                 # needs Triton; the paper's four systems at full size, no weights

A launch takes as long as its products at the rate, or its bytes at the bandwidth, whichever is longer; both are
published numbers times a share that is assumed (``ASSUMED``). What a step launches is counted in Inductor's code
(``cuda_codegen.py``); FLOP speed-ups are the cost model's. A CUDA graph leaves a gap between kernels; without one the
host launches them one by one, and the GPU may wait for it. Results go to ``benchmarks/results/roofline.{json,md}``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import save
from cuda_codegen import Codegen, optimized
from fake_gpu import Launch, fake_gpu
from paper_systems import SYSTEMS, System

import toca_compile
from toca_compile import BlockCache, Fora, TaylorSeer
from toca_compile.ir.plan import Policy

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class GPU:
    """Published rates: dense bfloat16 products with float32 sums in TFLOP/s, memory bandwidth in GB/s."""

    rate: float
    bandwidth: float


GPUS = {"A100": GPU(312, 2039), "H100": GPU(989, 3350), "L40S": GPU(362, 864), "RTX 4090": GPU(165, 1008)}
"""A100 SXM 80 GB and H100 SXM, as their data sheets say."""


@dataclass(frozen=True)
class Assumed:
    """What is assumed. ``products``, ``attention``, ``memory``: the share of the published numbers that is reached;
    ``host``: seconds that the host needs for a launch; ``gap``: those between two kernels of a CUDA graph."""

    products: float = 0.7
    attention: float = 0.5
    memory: float = 0.8
    host: float = 5e-6
    gap: float = 1e-6

    def __str__(self) -> str:
        return (
            f"products at {self.products:.0%} and attention at {self.attention:.0%} of the published rate, "
            f"{self.memory:.0%} of the published bandwidth, {self.host * 1e6:.0f} µs a launch by the host, "
            f"{self.gap * 1e6:.0f} µs between kernels of a CUDA graph"
        )


ASSUMED = Assumed()


def busy(launch: Launch, gpu: GPU, assumed: Assumed = ASSUMED) -> float:
    """Seconds of a launch on the GPU."""
    share = assumed.products if launch.kind == "gemm" else assumed.attention  # kernels of ours are no better than that
    return max(launch.flops / (gpu.rate * 1e12 * share), launch.moved / (gpu.bandwidth * 1e9 * assumed.memory))


def graphed(launches: Sequence[Launch], gpu: GPU, assumed: Assumed = ASSUMED) -> float:
    """Seconds of a step as one CUDA graph."""
    return sum(busy(launch, gpu, assumed) + assumed.gap for launch in launches)


def launched(launches: Sequence[Launch], gpu: GPU, assumed: Assumed = ASSUMED) -> float:
    """Seconds of a step that the host launches: each launch begins when the one before has ended and the host is
    there."""
    host = end = 0.0
    for launch in launches:
        host += assumed.host
        end = max(host, end + assumed.gap) + busy(launch, gpu, assumed)
    return end


WAYS = {"CUDA graphs": graphed, "launched": launched}


def predict(system: System) -> tuple[Rows, Rows]:
    """For each policy a row for each kind of step, and one for each GPU of a whole run."""
    opt, plain = optimized(system), optimized(system, known=False)
    steps: Rows = []
    runs: Rows = []
    with fake_gpu() as made:
        codegen = Codegen(plain, made)
        full = codegen.step(0, {call.variant: generated for call, generated in codegen.variants()})
        codegen = Codegen(opt, made)
        steps.append({"policy": "FullCompute", "step": "full", **_row(full, toca_compile.explain(opt).flops("full"))})
        for name, policy in policies(system).items():
            opt.policy = policy
            report: Any = toca_compile.explain(opt)
            of = {call.variant: generated for call, generated in codegen.variants()}
            run = [codegen.step(i, of) for i in range(len(codegen.schedule.rows))]
            kinds = [step.kind.value for step in codegen.schedule.plan.steps]
            for kind in dict.fromkeys(kinds):
                last = run[max(i for i, k in enumerate(kinds) if k == kind)]
                steps.append({"policy": name, "step": kind, **_row(last, report.flops(kind))})
                print(steps[-1], flush=True)
            for title, gpu in GPUS.items():
                row = {"policy": name, "GPU": title, "FLOP speed-up": report.flop_speedup()}
                for way, seconds in WAYS.items():
                    speedup = len(run) * seconds(full, gpu) / sum(seconds(step, gpu) for step in run)
                    row |= {f"predicted speed-up, {way}": speedup, f"ratio, {way}": speedup / row["FLOP speed-up"]}
                runs.append(row)
                print(row, flush=True)
    return steps, runs


def policies(system: System) -> dict[str, Policy]:
    """The published settings, and what suits any model at as many steps."""
    length = next(iter(system.policies.values())).num_steps
    return {
        **system.policies,
        f"Fora({length}, 3)": Fora(length, 3),
        f"TaylorSeer({length}, 3, 1)": TaylorSeer(length, 3, 1),
        f"BlockCache({length}, first=0, interval=3, order=1)": BlockCache(length, first=0, interval=3, order=1),
    }


def _row(launches: Sequence[Launch], flops: float) -> dict[str, Any]:
    products = sum(launch.flops for launch in launches)
    row: dict[str, Any] = {"TFLOP": float(flops) / 1e12, "TFLOP of products": products / 1e12}
    row |= {"GB moved": sum(launch.moved for launch in launches) / 1e9, "launches": len(launches)}
    for title, gpu in GPUS.items():
        row |= {f"{title} ms, {way}": 1e3 * seconds(launches, gpu) for way, seconds in WAYS.items()}
    return row


def main() -> None:
    """Predict for the chosen systems and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    given = parser.parse_args()
    for name in given.systems:
        torch._dynamo.reset()
        with torch.no_grad(), torch.device("meta"):
            system = SYSTEMS[name]("meta")
        steps, runs = predict(system)
        title = f"{system.name}, {system.size}"
        sections = {f"{title}: predicted steps": steps, f"{title}: predicted runs": runs}
        save("roofline", "cpu", sections, about=f"Predicted, not measured: {ASSUMED}")


if __name__ == "__main__":
    main()
