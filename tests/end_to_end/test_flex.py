"""Flex attention, and ``torch.vmap``: an attention whose mask is a function of indices, with its blocks made in forward
or brought along."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import toca_compile
from tests.models import randomize
from tests.runs import same_as_dense
from tests.versions import needs_transforms
from toca_compile import Composition, FullCompute, UnsupportedGraphError
from toca_compile.policies import Every, Partial, Queries, Rule, Selector, Share

WIDTH, HEADS, TOKENS, STEPS = 32, 2, 128, 3
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def some(*actions: Queries | Partial) -> Composition:
    """Half of the tokens, of all sites that can."""
    rules = tuple(Rule(action) for action in actions)
    return Composition(STEPS, Every(3), rules, which=Selector("random"), how_many=Share(0.5))


class Block(nn.Module):
    """An attention, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.slopes = nn.Parameter(torch.ones(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = flex_attention(q, k, v)  # type: ignore[assignment]
        return made

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Frames(Block):
    """Frames of 32 tokens, each of which reads those before it: their numbers are a table."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frame = torch.arange(TOKENS) // 32

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return frame[i] >= frame[j]

        blocks = create_block_mask(mask, None, None, TOKENS, TOKENS, device="cpu")
        return flex_attention(q, k, v, block_mask=blocks)  # type: ignore[return-value]


class Sloped(Block):
    """Scores that fall with the distance."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s - self.slopes[h] * (i - j).abs()

        return flex_attention(q, k, v, score_mod=score)  # type: ignore[return-value]


class Shown(Block):
    """The table of what reads what, made by ``torch.vmap``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(TOKENS)
        near = torch.vmap(torch.vmap(lambda i, j: (i - j).abs() < 40, (None, 0)), (0, None))(places, places)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)


def inputs(i: int) -> tuple[Tensor]:
    """A picture that changes from step to step."""
    first, change = (torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (1, 2 + i))
    return (first + 0.3 * i * change,)


@needs_transforms
@pytest.mark.parametrize("style", [Block, Frames, Sloped, Shown])
@torch.no_grad()
def test_attention_by_functions_of_indices(style: type[Block]) -> None:
    def look(opt: Any) -> None:
        assert any(0 < mask.float().mean() < 1 for mask in opt.fresh_tokens().values())

    policies = [some(Partial(), Queries("fresh")), some(Queries("update"))]
    opt = same_as_dense(randomize(style()), policies, [inputs(i) for i in range(STEPS)], look)
    attention, mlp = toca_compile.explain(opt).sites
    assert (attention.kind, mlp.kind) == ("self_attention", "mlp")
    assert ("queries" in attention.actions, "partial" in mlp.actions) == (True, True)


@needs_transforms
@pytest.mark.inductor
@torch.no_grad()
def test_some_queries_are_compiled() -> None:
    """How many is not told when they are."""
    model, policy = randomize(Block()), some(Queries("update"))
    opt, eager = (toca_compile.optimize(model, policy, lowering=name) for name in ("inductor", "eager"))
    for i in range(STEPS):
        torch.testing.assert_close(opt(*inputs(i)), eager(*inputs(i)), rtol=1e-5, atol=1e-5)


class Chosen(Block):
    """Blocks of keys that are chosen by what is in them: no function of indices tells which."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import BlockMask

        order = (q.mean((2, 3), keepdim=True) > 0).int()
        blocks = BlockMask.from_kv_blocks(order[..., 0] * 0 + 1, order * 0, BLOCK_SIZE=128)
        return flex_attention(q, k, v, block_mask=blocks)  # type: ignore[return-value]


@needs_transforms
@torch.no_grad()
def test_blocks_that_are_chosen_at_run_time_are_reused() -> None:
    net = randomize(Chosen())
    opt = toca_compile.optimize(net, FullCompute(), lowering="eager")
    assert torch.equal(opt(*inputs(0)), net(*inputs(0)))
    attention, mlp = toca_compile.explain(opt).sites
    assert ("queries" in attention.actions, "partial" in mlp.actions) == (False, True)
    assert "in blocks" in str(attention.reason)


class Asked(Block):
    """Its weights' sum is asked for too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made, total = flex_attention(q, k, v, return_lse=True)
        return made * total[..., None].sigmoid()


@torch.no_grad()
def test_what_else_flex_attention_gives_is_refused() -> None:
    opt = toca_compile.optimize(randomize(Asked()), FullCompute(), lowering="eager")
    with pytest.raises(UnsupportedGraphError, match=r"more than its result \(.*test_flex\.py"):
        opt(*inputs(0))
