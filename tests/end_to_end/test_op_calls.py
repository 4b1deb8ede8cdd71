"""Ops of which the arguments decide what a token needs, inside a branch of a model: refused by name and line, or right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toca_compile
from tests.models import randomize
from tests.runs import both_ways
from tests.sampling import noise, sample
from toca_compile import NoSiteError, PolicyError, TaylorToCa, ToCa
from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call
from toca_compile.rules.registry import RULES, Rule

aten = torch.ops.aten
SOME = ToCa(num_steps=3, interval=3, fresh_ratio=0.4, schedule="constant", score="none")
ONE = replace(SOME, fresh_ratio=0.07)

TOKENS = 16


class Op(nn.Module):
    """A function as a module."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same."""
        return self.call(x)


class Block(nn.Module):
    """Attention and an MLP on ``[2, 16, 8]``, and a picture around them."""

    def __init__(self, op: nn.Module, hidden: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, hidden), op, nn.Linear(hidden, 8))

    def embed(self, x: Tensor) -> Tensor:
        """Tokens of a picture."""
        return x.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``[batch, 8, 4, 4]`` to the same."""
        h = self.embed(x)
        q, k, v = self.qkv(h).unsqueeze(1).chunk(3, -1)
        if self.fused:
            h = h + F.scaled_dot_product_attention(q, k, v).squeeze(1)
        else:
            h = h + (torch.matmul(q, k.transpose(-2, -1)).softmax(-1) @ v).squeeze(1)
        return (h + self.mlp(h)).transpose(1, 2).reshape(x.shape)


def model_with(op: nn.Module, hidden: int = 12, fused: bool = True) -> Any:
    """A block whose MLP's middle is ``op``, on ``[2, 16, hidden]``."""
    return randomize(Block(op, hidden, fused))


PICTURE = noise(2, (4, 4), 8)


def reason_of(model: nn.Module) -> str | None:
    """Why the MLP is not partial. On the way: a full step is the model, a partial one its dense meaning."""
    eager = toca_compile.optimize(model, SOME, lowering="eager")
    assert torch.equal(sample(eager, 1, PICTURE), sample(model, 1, PICTURE))
    (mlp,) = (s for s in toca_compile.explain(eager).sites if "mlp" in s.name)
    assert (mlp.reason is None) == ("partial" in mlp.actions)
    if mlp.reason is None:
        for policy in (SOME, ONE):
            eager.policy = policy
            pictures = both_ways(eager, lambda opt: sample(opt, 3, PICTURE))
            torch.testing.assert_close(*pictures, rtol=1e-5, atol=1e-5)
            assert [r.kind for r in eager.steps] == ["full", "partial", "partial"]
    return mlp.reason


def by_rows(x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """``call`` on the value with tokens last."""
    return call(x.transpose(1, 2)).transpose(1, 2)


def written(x: Tensor, index: Any) -> Tensor:
    """A value of which a part is overwritten."""
    x = x.clone()
    x[index] = x[index] * 2
    return x


SHIFT = (0, 0, 1, -1)

MIXES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "pad, zeros": ("aten.pad.default", lambda x: F.pad(x, SHIFT)),
    "pad, circular": ("aten.pad.default", lambda x: by_rows(x, lambda y: F.pad(y, (1, -1), mode="circular"))),
    "pad, reflect": ("aten.pad.default", lambda x: by_rows(x, lambda y: F.pad(y, (1, -1), mode="reflect"))),
    "pad, replicate": ("aten.pad.default", lambda x: by_rows(x, lambda y: F.pad(y, (-1, 1), mode="replicate"))),
    "ZeroPad2d": ("aten.pad.default", nn.ZeroPad2d(SHIFT)),
    "constant_pad_nd": ("aten.constant_pad_nd.default", lambda x: aten.constant_pad_nd(x, SHIFT)),
    "half of the features shifted": ("aten.pad.default", lambda x: torch.cat([F.pad(x[..., :6], SHIFT), x[..., 6:]], -1)),
    "roll, no dims": ("aten.roll.default", lambda x: torch.roll(x, 2)),
    "roll, tokens": ("aten.roll.default", lambda x: torch.roll(x, (1, 1), (0, 1))),
    "roll, whole turn": ("aten.roll.default", lambda x: torch.roll(x, TOKENS, -2)),
    "flip": ("aten.flip.default", lambda x: x.flip(-2)),
    "cumsum": ("aten.cumsum.default", lambda x: x.cumsum(1) / TOKENS),
    "softmax": ("aten.softmax.int", lambda x: x.softmax(-2)),
    "topk of tokens": ("aten.topk.default", lambda x: by_rows(x, lambda y: y.topk(TOKENS)[0])),
    "sort": ("aten.sort.default", lambda x: x.sort(1)[0]),
    "sort, stable": ("aten.sort.stable", lambda x: torch.sort(x, dim=1, stable=True)[0]),
    "written over": ("aten.slice_scatter.default", lambda x: written(x, (slice(None), slice(2, 5)))),
    "one written over": ("aten.select_scatter.default", lambda x: written(x, (slice(None), -1))),
    "repeated and cut": ("aten.slice.Tensor", lambda x: x.repeat_interleave(2, 1)[:, :TOKENS]),
    "cut and joined": ("aten.cat.default", lambda x: torch.cat([x[:, -1:], x[:, :-1]], 1)),
    "joined with nothing": ("aten.cat.default", lambda x: torch.cat([x, x[:, :0]], 1)),
    "nothing in another shape": ("aten.add.Tensor", lambda x: x + x[:, :0].reshape(2, 4, 0, 3).sum()),
    "convolution": ("aten.conv1d.default", lambda x: by_rows(x, lambda y: F.conv1d(y, y.new_ones(12, 1, 3), padding=1, groups=12))),
    "pooling": ("aten.avg_pool2d.default", lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "index": ("aten.index_select.default", lambda x: x.index_select(1, torch.arange(TOKENS - 1, -1, -1))),
}  # fmt: skip


@pytest.mark.parametrize("what", list(MIXES))
def test_a_branch_that_moves_tokens_is_refused(what: str) -> None:
    op, call = MIXES[what]
    reason = reason_of(model_with(Op(call)))
    assert reason is not None
    assert reason.startswith(op)
    assert ".py:" in reason


SQUARE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "diagonal": ("aten.einsum.default", lambda x: torch.einsum("bnn->bn", x)[..., None] + x),
    "triangle": ("aten.tril.default", lambda x: x.tril()),
    "turned round": ("aten.transpose.int", lambda x: x.transpose(1, 2)),
}


@pytest.mark.parametrize("what", list(SQUARE))
def test_as_many_features_as_tokens(what: str) -> None:
    """Where sizes are equal by chance, a dimension is still the one that it is."""
    op, call = SQUARE[what]
    reason = reason_of(model_with(Op(call), TOKENS))
    assert reason is not None
    assert op in reason or "linear" in reason
    assert ".py:" in reason


CARRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "pad of features": lambda x: F.pad(x, (1, -1, 0, 0)),
    "roll of features": lambda x: torch.roll(x, 2, -1),
    "roll by nothing": lambda x: torch.roll(x, (0, 1), (1, 2)),
    "features written over": lambda x: written(x, (..., slice(2, 5))),
    "topk of features": lambda x: x.topk(12)[0],
    "diagonal of features": lambda x: torch.einsum("bnii->bni", x[..., None] * x[..., None, :]),
    "squeeze of what is longer": lambda x: x.squeeze(1),
    "squeeze of several": lambda x: x[:, :, None].squeeze((1, 2)),
    "squeeze": lambda x: x[:, :, None].squeeze(),
    "spread of features": lambda x: x / x.std(-1, keepdim=True),
    "window of features": lambda x: torch.cat([x.narrow(-1, -6, 6), x[..., :-6]], -1),
}


@pytest.mark.parametrize("what", list(CARRIES))
def test_a_branch_that_moves_features_is_partial(what: str) -> None:
    assert reason_of(model_with(Op(CARRIES[what]))) is None


@pytest.mark.parametrize("hidden", [12, TOKENS])
def test_prelu_has_a_slope_for_each_channel(hidden: int) -> None:
    """Channels are dimension 1: features where those stand there, tokens in ``[batch, tokens, width]``."""
    channels_first = nn.PReLU(hidden)
    module = Op(lambda x: by_rows(x, channels_first))
    module.slopes = channels_first
    assert reason_of(model_with(module, hidden)) is None
    torch._dynamo.reset()
    reason = reason_of(model_with(nn.PReLU(TOKENS), hidden))
    assert reason is None or reason.startswith("aten.prelu.default")


class OneByOne(Block):
    """Pictures embedded one at a time, without a batch."""

    def embed(self, x: Tensor) -> Tensor:
        """Tokens of a picture."""
        return super().embed(torch.stack([F.conv2d(picture, picture.new_ones(8, 8, 1, 1)) for picture in x]))


def test_a_call_that_no_rule_covers_refuses_its_branch_alone() -> None:
    reason = reason_of(model_with(Op(lambda x: torch.stack([F.conv1d(s.T, s.new_ones(12, 12, 1)).T for s in x]))))
    assert reason is not None
    assert reason.startswith("aten.conv1d.default has a rule that does not cover this call (test_op_calls.py:")
    torch._dynamo.reset()
    assert reason_of(randomize(OneByOne(nn.GELU(), 12, True))) is None


RAISED = [KeyError("x"), ZeroDivisionError("x"), AssertionError(), RuleError("x")]


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_whatever_a_rule_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of this call; all else about the model stands."""

    def axes(call: Call) -> Any:
        raise error

    monkeypatch.setitem(RULES, aten.gelu.default, replace(RULES[aten.gelu.default], axes=axes))
    reason = reason_of(model_with(nn.GELU()))
    assert reason is not None
    assert "aten.gelu.default has a rule that does not cover this call" in reason


@pytest.mark.parametrize("fused", [True, False])
def test_any_call_may_be_without_a_spec(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each op of a model in turn the rule says nothing: no pass trips over it. (Partial steps check themselves.)"""
    model = model_with(nn.GELU(), fused=fused)
    policy = TaylorToCa(3, 3, 1, 0.4, keys="update", warmup=1) if fused else replace(SOME, score="attention")
    rules, used = dict(RULES), dict.fromkeys(RULES, 0)

    def count(rule: Rule) -> Callable[[Call], Any]:
        def axes(call: Call) -> Any:
            used[rule.op] += 1
            return rule.axes(call)

        return axes

    def run() -> str:
        torch._dynamo.reset()
        opt = toca_compile.optimize(model, policy, lowering="eager")
        sample(opt, 3, PICTURE)
        return str(toca_compile.explain(opt))

    with monkeypatch.context() as watched:
        for op, rule in rules.items():
            watched.setitem(RULES, op, replace(rule, axes=count(rule)))
        run()
    refused = []
    for op in (op for op, times in used.items() if times):
        with monkeypatch.context() as one:
            one.setitem(RULES, op, replace(rules[op], axes=lambda call: {}["nothing"]))
            try:
                refused.append("has a rule that does not cover this call" in run())
            except (NoSiteError, PolicyError) as error:
                # What the queries are is no longer known; or what was asked for, some queries alone, cannot be.
                refused.append("has a rule that does not cover this call" in str(error))
    assert refused.count(True) >= 3
