"""Does the clock fall as much as the FLOPs? Every kind of policy on three models, against the compiled model itself.

    python benchmarks/clock.py                          # about 20 minutes on 2 cores
    python benchmarks/clock.py --models dit flux --repeats 5

20 steps each; the ratio is latency speed-up over FLOP speed-up, both against the same model compiled whole by the same
Inductor, in turns in one process. A second table has the time of each kind of step, as shares of a step of the compiled
model. diffusers' own caches run in the same way; their FLOPs are those that torch counts in an uncompiled sampling.
Results go to ``benchmarks/results/clock.{json,md}``.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from functools import partial as bind
from typing import Any

import torch
from common import RESULTS, dit, interleaved, save
from paper_systems import System, calling_pixart, sample
from peers import Peer, _reset_hooks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import toca_compile
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa

STEPS = 20
Rows = list[dict[str, Any]]


POLICIES: dict[str, tuple[Any, float]] = {
    "nothing reused (FullCompute)": (FullCompute(), 0.99),
    "Fora 3": (Fora(STEPS, 3), 0.95),
    "ToCa N=3, 10 %, random": (ToCa(STEPS, 3, 0.1, score="random"), 0.92),
    "ToCa N=3, 10 %, attention": (ToCa(STEPS, 3, 0.1), 0.92),
    "TaylorSeer o1 N=3": (TaylorSeer(STEPS, 3, 1), 0.95),
    "blocks, Newton o2 N=3": (BlockCache(STEPS, 0, interval=3, order=2, basis="newton"), 0.95),
    "blocks, Newton o2 N=5": (BlockCache(STEPS, 0, interval=5, order=2, basis="newton"), 0.95),
    "first block, threshold 0.2": (BlockCache(STEPS, threshold=0.2), 0.95),
}


def model_dit() -> System:
    """A DiT of 12 blocks of width 384 on 256 tokens, a guidance pair."""
    labels = torch.tensor([1, 1000])

    def call(model: Any, x: Tensor, t: Tensor) -> Tensor:
        return model(x, timestep=t, class_labels=labels).sample[:, :4]

    return System("DiT", "12 × 384, 256 tokens", dit(384, 12, 32), torch.randn(2, 4, 32, 32), call, {})


def model_flux() -> System:
    """A FLUX of 4 double and 8 single blocks of width 256 on 1024 tokens and a text of 64."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=4, num_single_layers=8, joint_attention_dim=256,
        pooled_projection_dim=128, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    text, pooled, guidance = torch.randn(1, 64, 256), torch.randn(1, 128), torch.full((1,), 3.5)
    ids = torch.zeros(32, 32, 3)
    ids[..., 1], ids[..., 2] = torch.arange(32)[:, None], torch.arange(32)[None]
    img_ids, txt_ids = ids.flatten(0, 1), torch.zeros(64, 3)

    def call(model: Any, x: Tensor, t: Tensor) -> Tensor:
        return model(
            hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t / 1000,
            img_ids=img_ids, txt_ids=txt_ids, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip

    return System("FLUX", "4 + 8 × 256, 1024 tokens", model.eval(), torch.randn(1, 1024, 64), call, {})


def model_pixart() -> System:
    """A PixArt of 12 blocks of width 512 on 1024 tokens, text of 64 words."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model: Any = PixArtTransformer2DModel(
        num_layers=12, num_attention_heads=8, attention_head_dim=64, cross_attention_dim=512, sample_size=64,
        caption_channels=256, use_additional_conditions=False,
    )  # fmt: skip
    call = calling_pixart(torch.randn(1, 64, 256), torch.ones(1, 64))
    return System("PixArt", "12 × 512, 1024 tokens", model.eval(), torch.randn(1, 4, 64, 64), call, {})


MODELS = {"dit": model_dit, "flux": model_flux, "pixart": model_pixart}


def measure(system: System, policies: dict[str, tuple[Any, float]], repeats: int) -> tuple[Rows, Rows]:
    """Whole samplings, and the kinds of steps in them."""
    torch._dynamo.reset()
    baseline = torch.compile(system.model, dynamic=False)
    sample(system, baseline, 2)
    runs: Rows = []
    steps: Rows = []
    for name, (policy, target) in policies.items():
        opt: Any = toca_compile.optimize(system.model, policy)
        seconds: dict[str, list[float]] = {}

        def run(opt: Any = opt, seconds: dict[str, list[float]] = seconds) -> None:
            sample(system, opt, STEPS)
            for step in opt.steps:
                seconds.setdefault(step.kind.value, []).append(step.seconds)

        sample(system, opt, STEPS)  # compiles every variant
        sample(system, opt, STEPS)
        flops = toca_compile.explain(opt).flop_speedup()
        median = interleaved({"baseline": bind(sample, system, baseline, STEPS), "opt": run}, repeats)
        runs.append(_row(system, name, flops, median, target))
        step = median["baseline"] / STEPS
        shares = {kind: statistics.median(times) / step for kind, times in seconds.items()}
        steps.append({"model": system.name, "policy": name, "baseline step ms": 1e3 * step, **_columns(shares)})
        print(runs[-1], steps[-1], flush=True)
    for name, make in _peers(system.model).items() if policies.keys() == POLICIES.keys() else ():
        try:
            peer, flops = make(), _counted(system, make())
            sample(system, peer, STEPS)
        except Exception as error:  # what a peer cannot do with a model is no row
            print(f"{name}: {error}", flush=True)
            continue

        def again(peer: Peer = peer) -> None:
            peer.reset()
            sample(system, peer, STEPS)

        median = interleaved({"baseline": bind(sample, system, baseline, STEPS), "opt": again}, repeats)
        runs.append(_row(system, name, flops, median, None))
        print(runs[-1], flush=True)
    return runs, steps


def _row(system: System, name: str, flops: float, median: dict[Any, float], target: float | None) -> dict[str, Any]:
    clock = median["baseline"] / median["opt"]
    return {
        "model": system.name,
        "policy": name,
        "FLOP speed-up": flops,
        "latency speed-up": clock,
        "ratio": clock / flops,
        "target": target if target is not None else "–",
        "baseline s": median["baseline"],
    }


def _columns(shares: dict[str, float]) -> dict[str, Any]:
    return {kind: shares.get(kind, "–") for kind in ("full", "partial", "forecast", "reuse", "skip")}


def _peers(model: Any) -> dict[str, Callable[[], Peer]]:
    """diffusers' own caches that say the same as one of the policies."""
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
    from diffusers.hooks import apply_first_block_cache, apply_taylorseer_cache

    def made(apply: Callable[..., Any], config: Any) -> Callable[[], Peer]:
        def make() -> Peer:
            net = copy.deepcopy(model)
            apply(net, config)
            return Peer(net, 1.0, lambda: _reset_hooks(net), compiled=True)

        return make

    layers = [r"(single_)?transformer_blocks\.\d+\.(attn1|attn|ff|ff_context|proj_mlp|proj_out)"]
    taylor = TaylorSeerCacheConfig(
        cache_interval=3, max_order=1, disable_cache_before_step=3, cache_identifiers=layers,
        taylor_factors_dtype=torch.float32,
    )  # fmt: skip
    return {
        "diffusers FirstBlockCache 0.2": made(apply_first_block_cache, FirstBlockCacheConfig(threshold=0.2)),
        "diffusers FirstBlockCache, never": made(apply_first_block_cache, FirstBlockCacheConfig(threshold=0.0)),
        "diffusers TaylorSeer o1 N=3": made(apply_taylorseer_cache, taylor),
    }


def _counted(system: System, peer: Peer) -> float:
    """How many times fewer FLOPs an uncompiled sampling has under a peer's cache."""
    totals = []
    peer.call = peer.model
    for model in (system.model, peer):
        with FlopCounterMode(display=False) as counter:
            sample(system, model, STEPS)
        totals.append(counter.get_total_flops())
    return totals[0] / totals[1]


def main() -> None:
    """Measure the chosen models and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--policies", nargs="+", default=[""], help="words in the names of those to run; the rows of others stay"
    )
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    policies = {name: p for name, p in POLICIES.items() if any(word in name for word in given.policies)}
    with torch.no_grad():
        for name in given.models:
            runs, steps = measure(MODELS[name](), policies, given.repeats)
            found = {f"{runs[0]['model']}": runs, f"{runs[0]['model']}, steps": steps}
            save("clock", "cpu", {title: _beside(title, rows) for title, rows in found.items()})


def _beside(title: str, rows: Rows) -> Rows:
    """Rows in the place of earlier ones of the same policies."""
    file = RESULTS / "clock.json"
    before: Rows = json.loads(file.read_text()).get(title, []) if file.exists() else []
    new = {row["policy"]: row for row in rows}
    return [new.pop(row["policy"], row) for row in before] + list(new.values())


if __name__ == "__main__":
    main()
