"""Attention within windows: a selected token reads the keys of its own.

Tokens lie apart from each other as the windows do: in a reshape and a permutation, in frames and places, in one row.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import toca_compile
from tests.models import randomize
from tests.runs import same_as_dense
from toca_compile import Composition, PolicyError
from toca_compile.policies import Every, Partial, Queries, Rule, Selector, Share

WIDTH, HEADS, STEPS = 8, 2, 3
FRESH = Rule(Queries("fresh"), kinds=("self_attention",))


def some(*rules: Rule) -> Composition:
    """Some of the tokens, of all sites that can."""
    return Composition(STEPS, Every(3), rules, which=Selector("random"), how_many=Share(0.4))


def inputs(i: int, tokens: int = 24) -> tuple[Tensor, ...]:
    """A picture that changes from step to step, and words of each frame that do not."""
    first, change = (torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (1, 2 + i))
    return first + 0.3 * i * change, torch.randn(2, 4, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def heads(x: Tensor) -> Tensor:
    """``[…, n, c]`` to ``[…, heads, n, d]``."""
    return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)


class Block(nn.Module):
    """An attention, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def within(self, x: Tensor) -> Tensor:
        """Rows ``[windows, places, c]`` attend within their window."""
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x), y)
        return x + self.mlp(x)


class Squares(Block):
    """Two by two of a picture of four by six."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        z = rearrange(x, "b (h p w q) c -> (b h w) (p q) c", h=2, p=2, w=3, q=2)
        return rearrange(self.within(z), "(b h w) (p q) c -> b (h p w q) c", h=2, p=2, w=3, q=2)


class Views(Block):
    """The same, moved by a permutation of six dimensions."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        apart = x.view(2, 2, 2, 3, 2, WIDTH).permute(0, 1, 3, 2, 4, 5)
        made = self.within(apart.reshape(-1, 4, WIDTH))
        return made.view(2, 2, 3, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


class Neighbours(Block):
    """Four in a row."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        return self.within(x.reshape(-1, 4, WIDTH)).reshape(x.shape)


class Space(Block):
    """Places of a frame, of four."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        return rearrange(self.within(rearrange(x, "b (f n) c -> (b f) n c", f=4)), "(b f) n c -> b (f n) c", f=4)


class Time(Block):
    """Frames of a place."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        return rearrange(self.within(rearrange(x, "b (f n) c -> (b n) f c", f=4)), "(b n) f c -> b (f n) c", n=6)


class Turned(Space):
    """With a table for the places of a window, and a rotation."""

    def within(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x + torch.arange(6.0)[:, None].sin()).chunk(3, -1))
        turn = torch.arange(6.0)[:, None].cos()
        q, k = q * turn, k * turn
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Masked(Neighbours):
    """A mask of each window, as moved ones need it, and a bias that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 4, 4))

    def within(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        far = (torch.arange(6)[:, None, None] + torch.arange(4)[:, None] - torch.arange(4)).abs() > 5
        mask = torch.zeros(6, 4, 4).masked_fill(far, -100.0)
        mask = (mask[:, None] + self.bias).repeat(2, 1, 1, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class WrittenOut(Squares):
    def within(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Summed(Block):
    """Frames and places in dimensions of their own, by einsum."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (4, 6)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        weights = torch.einsum("bfnhd,bfmhd->bfhnm", q, k).softmax(-1)
        return self.out(torch.einsum("bfhnm,bfmhd->bfnhd", weights, v).flatten(3).flatten(1, 2))


class Words(Block):
    """Each frame reads words of its own (the motion of a face)."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, _, _ = self.qkv(x).unflatten(1, (4, 6)).flatten(0, 1).chunk(3, -1)
        _, k, v = self.qkv(y).flatten(0, 1).chunk(3, -1)
        made = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)
        return self.out(made.unflatten(0, (2, 4)).flatten(1, 2))


STYLES = [Squares, Views, Neighbours, Space, Time, Turned, Masked, WrittenOut, Summed]


def look(opt: Any) -> None:
    """Some of the attention's tokens are computed."""
    attention, _ = opt.fresh_tokens().values()
    assert 0 < attention.float().mean() < 1


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_tokens_read_the_keys_of_their_window(style: type[Block]) -> None:
    policies = [some(FRESH), some(FRESH, Rule(Partial()))]
    opt = same_as_dense(randomize(style()), policies, [inputs(i) for i in range(STEPS)], look)
    attention, mlp = toca_compile.explain(opt).sites
    assert (attention.kind, attention.tokens, mlp.tokens) == ("self_attention", 24, 24)
    assert ("queries" in attention.actions, "partial" in mlp.actions) == (True, True)


@torch.no_grad()
def test_tokens_read_the_words_of_their_frame() -> None:
    opt = same_as_dense(randomize(Words()), [some(Rule(Partial()))], [inputs(i) for i in range(STEPS)], look)
    attention, _ = toca_compile.explain(opt).sites
    assert (attention.kind, "partial" in attention.actions) == ("cross_attention", True)


class Padded(Block):
    """Windows of a picture that is padded first."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        rows = F.pad(x.unflatten(1, (4, 6)), (0, 0, 0, 2, 0, 2))
        z = rearrange(rows, "b (h p) (w q) c -> (b h w) (p q) c", p=2, q=4)
        rows = rearrange(self.within(z), "(b h w) (p q) c -> b (h p) (w q) c", h=3, w=2, p=2, q=4)
        return rows[:, :4, :6].flatten(1, 2)


@torch.no_grad()
def test_windows_of_what_is_padded_are_reused() -> None:
    opt = toca_compile.optimize(randomize(Padded()), some(FRESH), lowering="eager")
    with pytest.raises(PolicyError, match="rearranges the tokens"):
        opt(*inputs(0))
    opt.policy = some(Rule(Partial()))
    opt(*inputs(0))
    assert ["partial" in s.actions for s in toca_compile.explain(opt).sites] == [False, True]
