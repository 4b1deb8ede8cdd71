"""What the host does in a step beside starting kernels: calls of a deep model whose graphs do nothing.

    python benchmarks/host.py

A FLUX of 19 + 38 blocks, as narrow as it can be, is optimised with a lowering whose graphs give back what they made
first, so that what is left is Python: ours, and what torch.compile does before it calls us. Beside it torch.compile
itself with a backend that does the same. Microseconds a step, medians of interleaved samplings, go to
``benchmarks/results/host.{json,md}``; another machine has others.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import save
from torch import Tensor

import toca_compile
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa
from toca_compile.ir.plan import Policy
from toca_compile.ir.program import Variant
from toca_compile.lowerings.registry import lowering

STEPS = 12
POLICIES: dict[str, Policy] = {
    "FullCompute": FullCompute(),
    "Fora": Fora(STEPS, 3),
    "TaylorSeer": TaylorSeer(STEPS, 3, 1),
    "BlockCache": BlockCache(STEPS, first=0, interval=3, order=1),
    "ToCa, random": ToCa(STEPS, 3, 0.1, schedule="constant", score="random"),
}


def once(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that gives what it gave first."""
    kept: list[Any] = []

    def again(*inputs: Any) -> Any:
        if not kept:
            kept.append(call(*inputs))
        return kept[0]

    return again


@lowering("nothing", compiles=True)
def nothing(variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Tensor]]:
    """A variant that is computed once."""
    return once(variant.module)


def flux() -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model as deep as FLUX.1-dev, and its inputs but for latents and time."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=19, num_single_layers=38, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    given = {
        "encoder_hidden_states": torch.randn(1, 8, 8), "pooled_projections": torch.randn(1, 8),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3), "guidance": torch.full((1,), 3.5),
        "return_dict": False,
    }  # fmt: skip
    return model.eval(), given


def sampled(model: Any, given: dict[str, Any]) -> list[float]:
    """Seconds of each call of a sampling."""
    seconds = []
    for t in torch.linspace(1, 1 / STEPS, STEPS):
        x = torch.randn(1, 16, 4)
        began = perf_counter()
        model(hidden_states=x, timestep=t[None], **given)
        seconds.append(perf_counter() - began)
    return seconds


@torch.no_grad()
def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    net, given = flux()
    plain = torch.compile(net, backend=lambda graph, _: once(graph.forward), dynamic=False)
    models = {name: toca_compile.optimize(net, policy, lowering="nothing") for name, policy in POLICIES.items()}
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for repeat in range(repeats + 2):
        told = sampled(plain, given)
        if repeat > 1:
            seconds["torch.compile", "full"] += told
        for name, opt in models.items():
            told = sampled(opt, given)
            if repeat > 1:
                for one, step in zip(told, opt.steps, strict=True):
                    seconds[name, step.kind.value] += [one]
    rows = [
        {"policy": policy, "step": kind, "µs": round(1e6 * median(s))} for (policy, kind), s in sorted(seconds.items())
    ]
    print(*rows, sep="\n")
    save("host", "cpu", {f"a step at 19 + 38 blocks, {repeats} samplings of {STEPS} steps": rows})


if __name__ == "__main__":
    main()
