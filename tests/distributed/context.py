"""One of two processes that hold different tokens of a model, or parts of its weights: run by ``spawn.py``.

diffusers' context parallelism, of both kinds, and keys and values gathered by hand. Each is sampled under every policy;
the first process samples the whole model under those of which the results are to be the same. Then a DiT whose weights
``fully_shard`` brings in, and may keep on the CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import toca_compile
from tests.distributed.sharded import inputs
from tests.models import PlainBlock, PlainDiT, randomize
from tests.pipelines import flux
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, TaylorToCa, ToCa, TocaError

STEPS = 6
EXACT: dict[str, Any] = {
    "full": FullCompute(),
    "fora": Fora(STEPS, 3),
    "taylor": TaylorSeer(STEPS, 2, 1),
    "blocks": BlockCache(STEPS, 0, interval=3, order=1),
    "adaptive": BlockCache(STEPS, threshold=1.0),
}
PARTIAL: dict[str, Any] = {
    "random": ToCa(STEPS, 3, 0.4, score="random", schedule="constant", bonus=0.0),
    "attention": ToCa(STEPS, 3, 0.4, schedule="constant", bonus=0.0),
    "queries": TaylorToCa(STEPS, 3, 1, 0.4, keys="update"),
}


class Gathered(PlainBlock):
    """Its queries are those of this process's tokens, and read the keys of all."""

    def attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (collectives.all_gather_tensor(one.contiguous(), 2, dist.group.WORLD) for one in (k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.proj(out)


class Parted(PlainDiT):
    """A DiT of whose tokens each process has a part between the first layer and the last."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.prepare(x, t, y)
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        for block in self.blocks:
            x = block(x, c)
        return self.finish(collectives.all_gather_tensor(x.contiguous(), 1, dist.group.WORLD), c)


def by_hand() -> tuple[nn.Module, nn.Module]:
    """The whole model, and the one of which this process has a part."""
    model = randomize(Parted(depth=2))
    blocks: Any = model.blocks
    for block in blocks:
        block.__class__ = Gathered
    return randomize(PlainDiT(depth=2)), model


def of_diffusers(make: Callable[[], Any] = lambda: flux(1, 1), **degrees: int) -> tuple[nn.Module, nn.Module]:
    """A FLUX, and one that diffusers parts."""
    from diffusers import ContextParallelConfig

    model = make()
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):  # it divides by the accelerators
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
    return make(), model


def joined_attention(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **how: Any) -> Any:
    """What diffusers' rings ask of an attention, which its own of the CPU does not tell; last but for keywords, whether
    they do."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    out = out.permute(0, 2, 1, 3)
    return (out, log_sum.permute(0, 2, 1)) if others[5] else out


def ring(make: Callable[[], Any] = lambda: flux(1, 1), **degrees: int) -> tuple[nn.Module, nn.Module]:
    """The same in a ring."""
    from diffusers.models import attention_dispatch

    attention_dispatch._native_attention_forward_op = joined_attention
    return of_diffusers(make, **degrees)


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "by hand": by_hand,
    "ulysses": lambda: of_diffusers(ulysses_degree=2),
    "ring": lambda: ring(ring_degree=2),
}


def calls(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The inputs of each step."""
    plain = {} if isinstance(model, PlainDiT) else {"return_dict": False}
    return ({**given, **plain} for given, _ in zip(inputs(model), range(STEPS), strict=False))


def sampled(opt: Any, whole: nn.Module, policy: Any = None) -> list[Tensor]:
    """The outputs of all steps."""
    if policy is not None:
        opt.policy = policy
    with torch.no_grad():
        outputs = [opt(**given) for given in calls(whole)]
    return [out if isinstance(out, Tensor) else out[0] for out in outputs]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, by the largest number of its step."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def compared(
    mine: nn.Module, whole: nn.Module, of_whole: dict[str, list[Tensor]], policies: dict[str, Any]
) -> dict[str, Any]:
    """The part of a model under each policy, against outputs of the whole, or against its own dense meaning."""
    uncached = sampled(mine, whole)
    shared = toca_compile.optimize(mine, EXACT["full"], lowering="eager")
    partial: dict[str, list[Tensor]] = {}
    told: dict[str, Any] = {"uncached": far(uncached, of_whole["full"])}
    for policy in policies:
        outputs = sampled(shared, whole, policies[policy])
        fresh = {site: mask.sum(1).tolist() for site, mask in shared.fresh_tokens().items()}
        told[policy] = {
            "kinds": "".join(step.kind.value[0] for step in shared.steps),
            "k": [step.k for step in shared.steps],
            "fresh": fresh,
        }
        if policy in EXACT:
            told[policy]["far"] = far(outputs, of_whole[policy])
        else:
            others = [torch.empty_like(torch.stack(outputs)) for _ in range(dist.get_world_size())]
            dist.all_gather(others, torch.stack(outputs))
            told[policy]["alike"] = all(torch.equal(others[0], other) for other in others)
            partial[policy] = outputs
    report = toca_compile.explain(shared)
    told["sites"] = {site.name: [site.kind, sorted(site.actions), site.reason] for site in report.sites}
    told["sent"] = {kind: report.sent_bytes(kind) for kind in report.step_counts}
    shared.lowering = "dense"
    for policy, outputs in partial.items():
        told[policy]["from dense"] = far(outputs, sampled(shared, whole, policies[policy]))
    return told


def main(place: int, count: int) -> dict[str, Any]:
    """What is found of all models."""
    found: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    for name, make in MODELS.items():
        whole, mine = make()
        kind = type(whole).__name__
        if kind not in wanted and not place:
            alone = toca_compile.optimize(whole, EXACT["full"], lowering="eager")
            wanted[kind] = {policy: sampled(alone, whole, EXACT[policy]) for policy in EXACT}
        sent = [wanted.get(kind)]
        dist.broadcast_object_list(sent)
        found[name] = compared(mine, whole, sent[0] or {}, {**EXACT, **PARTIAL})
    return {**found, "uneven": uneven(), "weights": weights()}


def uneven() -> list[Any]:
    """What is said of processes that may have other numbers of tokens, and whether the model runs."""
    _, model = of_diffusers(ulysses_degree=2, ulysses_anything=True)
    wanted, said = sampled(model, model), ""
    try:
        sampled(toca_compile.optimize(model, EXACT["fora"], lowering="eager"), model)
    except TocaError as error:
        said = str(error)
    uncached = sampled(toca_compile.optimize(model, EXACT["fora"], lowering="eager", strict=False), model)
    return [said, far(uncached, wanted)]


def weights() -> dict[str, Any]:
    """Samplings with weights that each process has a part of, against those with all of them."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    whole = randomize(PlainDiT(depth=2))
    alone = toca_compile.optimize(whole, EXACT["fora"], lowering="eager")
    wanted = {policy: sampled(alone, whole, {**EXACT, **PARTIAL}[policy]) for policy in ("fora", "blocks", "attention")}
    uncached = sampled(whole, whole)
    for name in ("whole", "blocks"):
        model = randomize(PlainDiT(depth=2))
        blocks: Any = model.blocks
        for block in blocks if name == "blocks" else ():
            fully_shard(block, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        fully_shard(model, mesh=mesh)
        shared = toca_compile.optimize(model, EXACT["fora"], lowering="eager")
        told = {p: far(sampled(shared, whole, {**EXACT, **PARTIAL}[p]), outputs) for p, outputs in wanted.items()}
        kinds = "".join(step.kind.value[0] for step in shared.steps)
        text = str(toca_compile.explain(shared))
        found[name] = {**told, "kinds": kinds, "text": text, "uncached": far(sampled(model, whole), uncached)}
    return found
