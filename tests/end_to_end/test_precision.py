"""Models of several precisions: blocks in bfloat16 between norms and a head in float32, a stream in either, and regions
of autocast, under policies of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.end_to_end.test_patterns import Block, inputs
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa
from toca_compile.policies import Composition, Every, Queries, Rule, Selector, Share

STEPS = 4
POLICIES: dict[str, Any] = {
    "frrr": Fora(STEPS, STEPS),
    "fppp": ToCa(STEPS, STEPS, 0.5, schedule="constant", bonus=0.0),
    "queries": Composition(
        STEPS, Every(STEPS), (Rule(Queries("update")),), which=Selector("random"), how_many=Share(0.5)
    ),
    "frff": TaylorSeer(STEPS, 2, 1),
    "fsfs": BlockCache(STEPS, first=0, interval=2, order=1),
}


class Halves(Block):
    """Norms in float32; between them bfloat16, and so is the stream."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x.float()).type_as(x))
        return x + self.mlp(self.norm2(x.float()).type_as(x))


class Wide(Block):
    """The same with a stream in float32."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x).bfloat16())
        return x + self.mlp(self.norm2(x).bfloat16()).float()


class Model(nn.Module):
    """Two blocks and a head in float32."""

    def __init__(self, block: type[nn.Module], stream: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2)).bfloat16()
        self.norm, self.head, self.stream = nn.LayerNorm(8), nn.Linear(8, 8), stream
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
        for p in self.parameters():
            p.data.copy_(0.4 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.stream)
        for block in self.blocks:
            x = block(x, y)
        return self.head(self.norm(x.float()))


class Regions(Model):
    """Weights in float32; attention and MLP in regions of autocast."""

    def __init__(self, block: type[nn.Module], stream: torch.dtype) -> None:
        super().__init__(block, stream)
        self.float()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            with torch.autocast("cpu", torch.bfloat16):
                x = block(x, y)
        return self.head(self.norm(x.float()))


@pytest.mark.parametrize(
    ("model", "block", "stream"),
    [
        (Model, Halves, torch.bfloat16),
        (Model, Wide, torch.float32),
        (Regions, Block, torch.float32),
    ],
)
@torch.no_grad()
def test_precisions_that_differ_within_a_model(
    model: type[Model], block: type[nn.Module], stream: torch.dtype
) -> None:  # fmt: skip
    net = model(block, stream).eval()
    opt: Any = toca_compile.optimize(net, FullCompute(), lowering="eager")
    for i in range(STEPS):
        assert torch.equal(opt(*inputs(i)), net(*inputs(i)))
    sites = toca_compile.explain(opt).sites
    assert [s.kind for s in sites] == ["self_attention", "mlp"] * 2
    assert all({"queries", "partial"} & s.actions for s in sites)
    plain = net(*inputs(0))
    for steps, policy in POLICIES.items():
        opt.policy = policy
        for i in range(STEPS):
            out = opt(*inputs(0))
            if steps == "frrr":
                assert torch.equal(out, plain), i
            torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)
        assert "".join(r.kind.value[0] for r in opt.steps) == (steps if steps != "queries" else "fppp")
