"""One of four processes that share the linear layers of a FLUX, those of its single blocks too, as diffusers' own plan of
tensor parallelism shares them; and then its tokens, in each way that diffusers parts them: run by ``spawn.py``."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import toca_compile
from tests.distributed.context import EXACT, PARTIAL, compared, far, ring, sampled
from tests.models import randomize
from tests.versions import newer
from toca_compile import BlockCache, Fora, TaylorToCa, ToCa

STEPS = 6
POLICIES: dict[str, Any] = {
    "fora": Fora(STEPS, 3),
    "attention": ToCa(STEPS, 3, 0.4),
    "adaptive": BlockCache(STEPS, threshold=1.0),
    "queries": TaylorToCa(STEPS, 3, 1, 0.4, keys="update"),
}


DEGREES: dict[str, dict[str, int]] = {
    "ulysses": {"ulysses_degree": 4},
    "ring": {"ring_degree": 4},
    "both": {"ulysses_degree": 2, "ring_degree": 2},
}
PARTED: dict[str, Any] = {"full": EXACT["full"], "blocks": EXACT["blocks"], "queries": PARTIAL["queries"]}


def model() -> Any:
    """A FLUX of four heads."""
    from diffusers import FluxTransformer2DModel

    made = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return randomize(made)


def shared(count: int) -> nn.Module:
    """The part of it that this process has. diffusers does that on accelerators alone."""
    from diffusers import TensorParallelConfig
    from diffusers.hooks import tensor_parallel

    part: nn.Module = model()
    config = TensorParallelConfig(tp_degree=count, mesh=init_device_mesh("cpu", (count,)))
    with (
        mock.patch.object(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",)),
        mock.patch.object(torch.accelerator, "device_count", return_value=1),
    ):
        part.enable_parallelism(config=config)  # type: ignore[operator]
    return part


def main(place: int, count: int) -> dict[str, Any]:
    """What is found under each policy."""
    whole, part = model(), shared(count)
    wanted: dict[str, Any] = {}
    if not place:
        alone = toca_compile.optimize(whole, POLICIES["fora"], lowering="eager")
        for name, policy in POLICIES.items():
            outputs = sampled(alone, whole, policy)
            wanted[name] = outputs, {site: mask.int().tolist() for site, mask in alone.fresh_tokens().items()}
    sent = [wanted]
    dist.broadcast_object_list(sent)
    opt, found = toca_compile.optimize(part, POLICIES["fora"], lowering="eager"), dict[str, Any]()
    for name, policy in POLICIES.items():
        outputs, (others, tokens) = sampled(opt, whole, policy), sent[0][name]
        fresh = {site: mask.int().tolist() for site, mask in opt.fresh_tokens().items()}
        report = toca_compile.explain(opt)
        found[name] = {
            "far": far(outputs, others),
            "tokens as alone": fresh == tokens,
            "fresh": fresh,
            "kinds": "".join(step.kind.value[0] for step in opt.steps),
            "sites": {site.name: [site.kind, sorted(site.actions)] for site in report.sites},
            "sent": {kind: report.sent_bytes(kind) for kind in report.step_counts},
        }
    alone = toca_compile.optimize(whole, PARTED["full"], lowering="eager")
    of_whole = {policy: sampled(alone, whole, PARTED[policy]) for policy in ("full", "blocks")}
    for name, degrees in DEGREES.items() if newer("2.12") else ():
        found[name] = compared(ring(model, **degrees)[1], whole, of_whole, PARTED)
    return found
