"""One of two processes that share the work of models: run by ``spawn.py``.

Each samples every sharded model under every policy, the first also the whole model under the same, and tells how far
the one is from the other, which tokens the steps computed, and the report.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import toca_compile
from tests.models import PlainDiT, diffusers_dit, randomize
from tests.pipelines import flux
from tests.runs import kinds
from toca_compile import BlockCache, Fora, TaylorToCa, ToCa
from toca_compile.policies import Anchors, ClusCa, Composition, Every, Polynomial, Rule

STEPS, WORLD = 8, 2
POLICIES: dict[str, Any] = {
    "fora": Fora(STEPS, 4),
    "random": ToCa(STEPS, 4, 0.3, score="random"),
    "attention": ToCa(STEPS, 4, 0.3),
    "queries": TaylorToCa(STEPS, 4, 1, 0.3, keys="update"),
    "clusters": ClusCa(STEPS, 4, clusters=4),
    "anchors": Composition(STEPS, Every(4), (Rule(Anchors(Polynomial(), 3)),)),
    "blocks": BlockCache(STEPS, 0, interval=4, order=1),
    "adaptive": BlockCache(STEPS, threshold=1.0),
}


class Column(nn.Module):
    """This process's part of a linear layer's features."""

    def __init__(self, whole: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(p.detach().chunk(WORLD)[rank]) for p in (whole.weight, whole.bias))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Row(nn.Module):
    """A linear layer of whose input each process has a part."""

    def __init__(self, whole: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.detach().chunk(WORLD, 1)[rank])
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        return collectives.all_reduce(nn.functional.linear(x, self.weight), "sum", dist.group.WORLD) + self.bias


class Scattered(Row):
    """The same by two collectives: each process gets the sum of a half of the rows, and sends it to all."""

    def forward(self, x: Tensor) -> Tensor:
        own = nn.functional.linear(x, self.weight).transpose(0, 1).contiguous()
        part = collectives.reduce_scatter_tensor(own, "sum", 0, dist.group.WORLD)
        return collectives.all_gather_tensor(part, 0, dist.group.WORLD).transpose(0, 1) + self.bias


def by_hand(row: Callable[[nn.Linear, int], nn.Module] = Row) -> tuple[nn.Module, Callable[[int], nn.Module]]:
    """A DiT whose MLPs are shared."""

    def shard(rank: int) -> nn.Module:
        model = randomize(PlainDiT(depth=3))
        blocks: Any = model.blocks
        for block in blocks:
            block.mlp[0], block.mlp[2] = Column(block.mlp[0], rank), row(block.mlp[2], rank)
        return model

    return randomize(PlainDiT(depth=3)), shard


def _plan(attention: str, mlp: str) -> dict[str, Any]:
    columns = [f"{attention}.to_{x}" for x in "qkv"] + [f"{mlp}.net.0.proj"]
    rows = [f"{attention}.to_out.0", f"{mlp}.net.2"]
    return dict.fromkeys(columns, ColwiseParallel()) | dict.fromkeys(rows, RowwiseParallel())


def _shared(model: Any, blocks: Any, *plans: dict[str, Any]) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in blocks:
        for name in [n for n, m in block.named_modules() if hasattr(m, "heads")]:
            block.get_submodule(name).heads //= WORLD
        for plan in plans:
            parallelize_module(block, mesh, plan)
    return model


def of_diffusers() -> tuple[nn.Module, Callable[[int], nn.Module]]:
    """diffusers' DiT whose heads and MLPs are shared, by torch's own tensor parallelism."""

    def shard(rank: int) -> nn.Module:
        model = diffusers_dit()
        return _shared(model, model.transformer_blocks, _plan("attn1", "ff"))

    return diffusers_dit(), shard


def of_flux() -> tuple[nn.Module, Callable[[int], nn.Module]]:
    """A FLUX, of whose double blocks the picture's MLPs are shared."""

    def shard(rank: int) -> nn.Module:
        model = flux()
        plan = {"ff.net.0.proj": ColwiseParallel(), "ff.net.2": RowwiseParallel()}
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in model.transformer_blocks:
            parallelize_module(block, mesh, plan)
        return model

    return flux(), shard


MODELS = {
    "by hand": by_hand,
    "scattered": lambda: by_hand(Scattered),
    "diffusers": of_diffusers,
    "flux": of_flux,
}


def inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Those of each step: noise that changes a little from one to the next."""
    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(model, "config", None)
    shape = (2, 2, 8, 8) if config is None or hasattr(config, "sample_size") else (2, 16, config.in_channels)
    x = torch.randn(shape, generator=generator)
    words = torch.randn(2, 4, 64, generator=generator)  # no two alike, or which is selected is a matter of rounding
    for step in range(STEPS):
        x, time = x + 0.02 * torch.randn(shape, generator=generator), torch.full((2,), 900 - 100 * step)
        if config is None:
            yield {"x": x, "t": time, "y": torch.arange(2)}
        elif hasattr(config, "sample_size"):
            yield {"hidden_states": x, "timestep": time, "class_labels": torch.arange(2)}
        else:
            yield {
                "hidden_states": x,
                "encoder_hidden_states": words[..., : config.joint_attention_dim],
                "pooled_projections": torch.ones(2, config.pooled_projection_dim),
                "timestep": time / 1000,
                "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1),
                "txt_ids": torch.zeros(4, 3),
            }


def sampled(opt: Any, model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """Outputs, and which tokens each step computed."""
    outputs, tokens = [], []
    with torch.no_grad():
        for given in inputs(model):
            out = opt(**given)
            outputs.append(out if isinstance(out, Tensor) else out[0])
            tokens.append({name: fresh.int().tolist() for name, fresh in opt.fresh_tokens().items()})
    return outputs, tokens


def of_whole(whole: nn.Module) -> dict[str, Any]:
    """Of the whole model under each policy: outputs, which tokens each step computed, and the kinds of steps."""
    alone, found = toca_compile.optimize(whole, POLICIES["fora"], lowering="eager"), {}
    for name, policy in POLICIES.items():
        alone.policy = policy
        found[name] = *sampled(alone, whole), kinds(alone)
    return found


def main(rank: int, _: int) -> dict[str, Any]:
    """All models, and their reports."""
    found: dict[str, Any] = {}
    wholes: dict[str, dict[str, Any]] = {}  # by the kind of the model: what the first process samples of the whole one
    for name, make in MODELS.items():
        whole, shard = make()
        kind = type(whole).__name__
        if kind not in wholes:
            sent = [of_whole(whole) if rank == 0 else None]
            dist.broadcast_object_list(sent)
            wholes[kind] = cast(Any, sent[0])
        shared = toca_compile.optimize(shard(rank), POLICIES["fora"], lowering="eager")
        for policy_name, policy in POLICIES.items():
            shared.policy = policy
            wanted, tokens, kinds_alone = wholes[kind][policy_name]
            outputs, chosen = sampled(shared, whole)
            report = toca_compile.explain(shared)
            found[f"{name}, {policy_name}"] = {
                "far": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, wanted, strict=True)),
                "tokens as alone": chosen == tokens,
                "tokens": chosen,
                "kinds": kinds(shared),
                "kinds alone": kinds_alone,
                "sent": {kind: report.sent_bytes(kind) for kind in report.step_counts},
                "text": str(report),
            }
            if policy_name == "adaptive":
                graphs = report.graphs().values()
                found[f"{name}, adaptive"]["agreed"] = sum(
                    t.count("all_reduce(") for t in graphs if "relative_change" in t
                )
    return found
