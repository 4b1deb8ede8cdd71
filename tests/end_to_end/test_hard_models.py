"""Models that a proof or a rewriting once got wrong, each as small as it can be.

The oracle owes nothing to the compiler: at inputs that do not change, what is kept is what would be computed, so every
policy must give the plain model's output at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import toca_compile
from tests.models import randomize, timestep_features
from tests.runs import same_as_dense
from toca_compile import (
    Composition,
    DuCa,
    Fora,
    PassError,
    PolicyError,
    TaylorToCa,
    ToCa,
    UnsupportedGraphError,
    VerifyError,
)
from toca_compile.ir.state import State
from toca_compile.passes.variants import rewrite
from toca_compile.policies import Every, Partial, Queries, Rule, Selector, Share

WIDTH, HEADS, TOKENS, STEPS = 8, 2, 16, 3
Inputs = Callable[[int], tuple[Tensor, ...]]


class Net(nn.Module):
    """Blocks on ``[batch, tokens, width]`` between an embedding and a head; each is given the stream and the time."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.time = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.embed(x) + self.positions, self.time(timestep_features(t, 8))[:, None]
        for block in self.blocks:
            h = block(h, c)
        return self.head(h + c)


class Block(nn.Module):
    """Branches one after the other, each added to the stream."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x, c)
        return x


class Attention(nn.Module):
    """Pre-norm self-attention."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal = causal

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values, ``[3, batch, heads, tokens, d]``."""
        return self.qkv(x).reshape(x.shape[0], -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)

    def attend(self, x: Tensor) -> Tensor:
        """On ``[batch, tokens, width]``."""
        out = F.scaled_dot_product_attention(*self.heads(x).unbind(0), is_causal=self.causal)
        return self.out(out.transpose(1, 2).reshape(x.shape))

    def across(self, x: Tensor, y: Tensor) -> Tensor:
        """The queries of ``x`` on keys and values of ``y``."""
        q, (_, k, v) = self.heads(x)[0], self.heads(y).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.attend(self.norm(x) + c)


class Mlp(nn.Module):
    """Pre-norm MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x) + c)))


def inputs(i: int) -> tuple[Tensor, ...]:
    """The input of step ``i``: a picture that changes a little, and the time."""
    first = torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    change = torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(2 + i))
    return first + 0.3 * i * change, torch.full((2,), 900 - 50 * i)


def queries(keys: str, score: str = "random", **how: Any) -> Composition:
    """Some tokens of every site, through attention too."""
    rule = Rule(Queries(keys, **how))
    return Composition(STEPS, Every(3), (rule,), which=Selector(score), how_many=Share(0.4))


QUERIES = {
    "fresh": queries("fresh"),
    "update": queries("update"),
    "keep": queries("keep"),
}
TAYLOR = TaylorToCa(STEPS, 3, 1, 0.4, keys="keep")
OTHERS: dict[str, Any] = {
    "reuse": Fora(STEPS, 3),
    "toca": ToCa(STEPS, 3, 0.4, schedule="constant", bonus=0.0),
    "duca": DuCa(STEPS, 3, 0.4, schedule="constant", bonus=0.0),
    "forecast": TaylorToCa(STEPS, 3, 1, 0.4),
}


def check(model: nn.Module, policies: Sequence[Any], make: Inputs = inputs, partial: bool = True) -> Any:
    """The restricted graph is its dense meaning at changing inputs, and the plain model at inputs that stay. Returns
    the optimised model."""

    def look(eager: Any) -> None:
        assert not partial or any("partial" in s.kind for s in eager.steps)

    return same_as_dense(model, policies, [make(i) for i in range(STEPS)], look)


# -- what queries read whole ------------------------------------------------------------------------------------------


class StreamAttention(nn.Module):
    """Keys and values are the residual stream itself, as different ops take them."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.query, self.norm, self.style = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), style

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm(x) if self.style == "normed" else x  # one value is read by its rows and whole
        q = self.query(x)
        if self.style == "matmul":
            return (0.2 * q @ x.transpose(1, 2)).softmax(-1) @ x
        if self.style == "einsum":
            return torch.einsum("bnm,bmc->bnc", (0.2 * torch.einsum("bnc,bmc->bnm", q, x)).softmax(-1), x)
        if self.style == "all three":
            return F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(q, x, x)


@pytest.mark.parametrize("style", ["matmul", "einsum", "fused", "all three", "normed"])
def test_keys_are_the_stream(style: str) -> None:
    opt = check(randomize(Net(Block(StreamAttention(style), Mlp()))), [*QUERIES.values(), TAYLOR])
    assert all(set(s.actions) & {"partial", "queries"} for s in toca_compile.explain(opt).sites)


class Picked(nn.Module):
    """An MLP on some of the tokens, which all tokens read."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.query = Mlp(), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("index", torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))[:6])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.mlp(x.index_select(1, self.index), c)
        return F.scaled_dot_product_attention(self.query(x), y, x.index_select(1, self.index))


def test_keys_are_picked_from_the_stream() -> None:
    check(randomize(Net(Block(Picked(), Mlp()))), [QUERIES["fresh"], QUERIES["keep"]])


class JointNet(Net):
    """Two streams, each with its own weights, in one attention; blocks are serial or parallel."""

    def __init__(self, *parallel: bool) -> None:
        super().__init__()
        self.words = nn.Linear(4, WIDTH)
        self.parallel = parallel
        self.joint = nn.ModuleList(nn.ModuleList([Attention(), Attention(), Mlp(), Mlp()]) for _ in parallel)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        assert text is not None
        h, y, c = self.embed(x) + self.positions, self.words(text), self.time(timestep_features(t, 8))[:, None]
        n = y.shape[1]
        for parts, parallel in zip(self.joint, self.parallel, strict=True):
            of_y, of_x, mlp_y, mlp_x = cast(Any, parts)
            qkv = torch.cat([of_y.heads(of_y.norm(y) + c), of_x.heads(of_x.norm(h) + c)], 3)
            out = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
            if parallel:
                h, y = h + of_x.out(out[:, n:]) + mlp_x(h, c), y + of_y.out(out[:, :n]) + mlp_y(y, c)
            else:
                h, y = h + of_x.out(out[:, n:]), y + of_y.out(out[:, :n])
                h, y = h + mlp_x(h, c), y + mlp_y(y, c)
        return self.head(h + c)


def with_text(i: int) -> tuple[Tensor, ...]:
    """As ``inputs``, with five words."""
    return *inputs(i), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(9))


def test_keys_that_two_streams_share() -> None:
    check(randomize(JointNet(False, True)), [QUERIES["update"], QUERIES["keep"], OTHERS["toca"]], with_text)


def test_a_variant_that_does_not_write_what_is_read_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rewrite._kept_inside

    def forgets(*args: Any) -> Any:
        return [(node, slot) for node, slot in right(*args) if slot.kind is not State.KEYS or slot.index == 0]

    monkeypatch.setattr(rewrite, "_kept_inside", forgets)
    opt = toca_compile.optimize(randomize(Net(Block(Attention(), Mlp()))), QUERIES["keep"], lowering="eager")
    with torch.no_grad(), pytest.raises(PassError, match=r"does not write.*keys") as caught:
        opt(*inputs(0))
    assert isinstance(caught.value.__cause__, VerifyError)


# -- shapes -----------------------------------------------------------------------------------------------------------


class TorchAttention(nn.Module):
    """torch's own attention module."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.norm, self.weights = nn.LayerNorm(WIDTH), weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.norm(x) + c
        return self.attention(y, y, y, need_weights=self.weights)[0]


class TorchLayer(nn.Module):
    """torch's own transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.layer(x + c)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Block(TorchAttention(False), Mlp()), lambda: Block(TorchAttention(True), Mlp()),
        TorchLayer,
    ],
    ids=["fused", "with weights", "layer"],
)  # fmt: skip
def test_torchs_own_attention(make: Callable[[], nn.Module]) -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the plain model by the same arithmetic
    try:
        check(randomize(Net(make())), [QUERIES["fresh"], QUERIES["keep"]])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Video(nn.Module):
    """``[batch, frames, places, width]``: attention within a frame, then along the frames, modulated frame by frame."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(4, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.space, self.frames, self.mlp = Attention(), Attention(causal), Mlp()
        self.modulation, self.norm = nn.Linear(WIDTH, 9 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, (b, f, n, _) = self.embed(x), x.shape
        c = self.time(timestep_features(t.reshape(-1), 8)).reshape(b, f, WIDTH)
        s1, d1, g1, s2, d2, g2, s3, d3, g3 = self.modulation(c)[:, :, None].chunk(9, -1)
        y = self.space.attend((self.norm(h) * (1 + d1) + s1).reshape(b * f, n, WIDTH))
        h = h + g1 * y.reshape(b, f, n, WIDTH)
        y = (self.norm(h) * (1 + d2) + s2).transpose(1, 2).reshape(b * n, f, WIDTH)
        h = h + g2 * self.frames.attend(y).reshape(b, n, f, WIDTH).transpose(1, 2)
        return self.head(h + g3 * self.mlp.down(F.gelu(self.mlp.up(self.norm(h) * (1 + d3) + s3))))


@pytest.mark.parametrize("causal", [False, True])
def test_space_and_time_modulated_by_frame(causal: bool) -> None:
    def make(i: int) -> tuple[Tensor, ...]:
        x, _ = inputs(i)
        return x.reshape(2, 4, 4, 4), torch.full((2, 4), 900 - 50 * i)

    opt = check(randomize(Video(causal)), list(OTHERS.values()), make, partial=False)
    sites = toca_compile.explain(opt).sites
    assert "partial" in sites[-1].actions
    assert "partial" in sites[1].actions or "test_hard_models.py" in (sites[1].reason or "")


class OwnStatistics(nn.Module):
    """Tokens normalised by their statistics over all tokens, with a gate for each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) + c
        return torch.sigmoid(self.gate(x)) * self.down(F.silu(self.up(y)))


def test_statistics_over_tokens() -> None:
    check(
        randomize(Net(Block(Attention(), OwnStatistics()))), [queries(keys, "attention") for keys in ("fresh", "keep")]
    )


class TokensFirst(Net):
    """``[tokens, batch, width]`` within the model."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = (self.embed(x) + self.positions).transpose(0, 1), self.time(timestep_features(t, 8))
        for block in self.blocks:
            attention, mlp = cast(Any, block).branches
            h = h + attention.attend((attention.norm(h) + c).transpose(0, 1)).transpose(0, 1)
            h = h + mlp(h, c)
        return self.head((h + c).transpose(0, 1))


def test_tokens_before_samples() -> None:
    policy = Composition(STEPS, Every(3), (Rule(Partial()),), which=Selector("random"), how_many=Share(0.4))
    check(randomize(TokensFirst(Block(Attention(), Mlp()))), [policy, QUERIES["update"]])


class Learned(Net):
    """A few learned queries read the text, and the picture reads them."""

    def __init__(self) -> None:
        super().__init__(Block(Attention(), Mlp()))
        self.words, self.learned = nn.Linear(4, WIDTH), nn.Parameter(torch.randn(1, 3, WIDTH))
        self.reads, self.mlps = nn.ModuleList([Attention(), Attention()]), nn.ModuleList([Mlp(), Mlp()])
        self.picture = Attention()

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        assert text is not None
        z, y, c = self.learned.expand(x.shape[0], -1, -1), self.words(text), self.time(timestep_features(t, 8))
        for read, mlp in zip(self.reads, self.mlps, strict=True):
            z = z + cast(Any, read).across(z, y)
            z = z + mlp(z, torch.zeros(WIDTH))
        h = self.embed(x) + self.positions
        h = h + self.picture.across(h, z)
        return self.head(self.blocks[0](h, c[:, None]))


def test_learned_queries_of_the_text() -> None:
    opt = check(randomize(Learned()), [OTHERS["toca"]], with_text)
    assert len(toca_compile.explain(opt).sites) == 7


class Unfused(Attention):
    """Heads beside samples in one dimension, and a table of that shape that all logits are added to."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x).flatten(1, 2).unbind(0)
        table = torch.zeros(q.shape[0], q.shape[1], k.shape[1])
        weights = torch.baddbmm(table, q, k.transpose(1, 2), beta=0, alpha=0.5).softmax(-1)
        return self.out((weights @ v).reshape(x.shape[0], HEADS, TOKENS, -1).transpose(1, 2).reshape(x.shape))


def test_a_table_with_samples_beside_heads() -> None:
    model = randomize(Net(Block(Unfused(), Mlp())))
    check(model, [OTHERS["toca"]])
    opt = toca_compile.optimize(model, QUERIES["fresh"], lowering="eager")
    with torch.no_grad(), pytest.raises(PolicyError, match=r"baddbmm.*samples.*test_hard_models\.py:\d+"):
        opt(*inputs(0))


# -- blocks that are alike --------------------------------------------------------------------------------------------


class Parallel(Block):
    """Branches beside each other, all on the stream as it enters."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out = x
        for branch in self.branches:
            out = out + branch(x, c)
        return out


def test_serial_and_parallel_blocks_are_not_one_template() -> None:
    """An MLP on the stream, then one beside an attention: the same ops, but one input where the others have two."""
    parallel = [Parallel(Attention(), Mlp()) for _ in range(2)]
    model = randomize(Net(Block(Mlp()), *parallel, Block(Attention(), Mlp())))
    opt = check(model, [OTHERS["toca"]])
    assert len(toca_compile.explain(opt).sites) == 7


# -- scores -----------------------------------------------------------------------------------------------------------


class OverQueries(nn.Module):
    """Weights of tokens on tokens that sum to one over the readers."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.value = style, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        weights = (0.1 * torch.einsum("bnc,bmc->bnm", x, x)).softmax(-2)
        return weights @ x if self.style == "stream" else torch.einsum("bnm,bmc->bnc", weights, self.value(x))


@pytest.mark.parametrize("style", ["stream", "values"])
def test_a_softmax_over_queries_is_no_score(style: str) -> None:
    blocks = [Block(OverQueries(style), Mlp()), Block(OverQueries(style), Mlp()), Block(Attention(), Mlp())]
    check(randomize(Net(*blocks)), [OTHERS["toca"], OTHERS["duca"], replace(OTHERS["toca"], score="v_norm")])


# -- capture ----------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A block under ``torch.utils.checkpoint``."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.how == "keywords":
            out: Tensor = checkpoint(self.inner, x, c=c, use_reentrant=False)
        elif self.how == "tuple":
            out, _ = checkpoint(lambda x, c: (self.inner(x, c), c), x, c, use_reentrant=False)
        else:
            out = checkpoint(self.inner, x, c, use_reentrant=self.how == "reentrant")
        return out


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", ["reentrant", "plain", "keywords", "tuple", "nested"])
def test_checkpoints_are_seen_through(how: str) -> None:
    def block() -> nn.Module:
        inner = Checkpointed(Mlp(), "plain") if how == "nested" else Mlp()
        return Checkpointed(Block(Attention(), inner), how)

    opt = check(randomize(Net(block())), [OTHERS["toca"]])
    assert [s.kind for s in toca_compile.explain(opt).sites] == ["self_attention", "mlp"]


class Autocast(nn.Module):
    """A branch in bfloat16, with a part of it in float32 again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.inner(x, c)
            assert y.dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                z = self.out(y.float())
        return z.type_as(x)


def test_autocast_within_the_model() -> None:
    check(randomize(Net(Block(Autocast(Attention()), Autocast(Mlp())))), [QUERIES["update"]])


def test_autocast_around_a_model_that_switches_it_off() -> None:
    opt = toca_compile.optimize(randomize(Net(Block(Autocast(Attention()), Mlp()))), Fora(2, 2), lowering="eager")
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedGraphError, match="off or to"),
    ):
        opt(*inputs(0))


class TwoStreams(Net):
    """Streams that change places, or take turns (a reversible network)."""

    def __init__(self, how: str) -> None:
        super().__init__(*(nn.ModuleList((Attention(), Mlp())) for _ in range(2)))
        self.how = how

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.embed(x) + self.positions, self.time(timestep_features(t, 8))[:, None]
        g = h * 0.5 if self.how == "swapped" else h
        blocks: Any = self.blocks
        for attention, mlp in blocks:
            if self.how == "swapped":
                h, g = g + attention(h, c), h
                h = (h + mlp(g, c)) * 0.9
            else:
                g = g + attention(h, c)
                h = h + mlp(g, c)
        return self.head(h + g)


@pytest.mark.parametrize("how", ["swapped", "reversible"])
def test_a_stream_that_begins_within_a_branch(how: str) -> None:
    opt = check(randomize(TwoStreams(how)), [*QUERIES.values(), TAYLOR, *OTHERS.values()], partial=False)
    assert toca_compile.explain(opt).sites


class Around(nn.Module):
    """``x + y + mlp(…)`` around an attention's ``y``, whose sum with the stream is written twice or with a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.attention, self.mlp, self.factor = Attention(), Mlp(), factor

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.attention(x, c)
        return x + y + self.mlp(x + (y if self.factor == 1 else self.factor * y), c)


@pytest.mark.parametrize("factor", [1, 0.5])
def test_a_branch_around_what_another_adds(factor: float) -> None:
    opt = check(
        randomize(Net(Around(factor), Around(factor))), [*QUERIES.values(), TAYLOR, *OTHERS.values()], partial=False
    )
    kinds = [site.kind for site in toca_compile.explain(opt).sites]
    assert kinds == (["self_attention", "mlp"] if factor == 1 else ["self_attention"]) * 2


class Telling(Net):
    """Hands out what a branch made, too."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        h, c = self.embed(x) + self.positions, self.time(timestep_features(t, 8))[:, None]
        y = self.blocks[0](h, c)
        return self.head(h + y + self.blocks[1](h + y, c)), y.unbind(1)[0], y[:, -2:], c


def test_who_writes_to_what_is_handed_out_changes_no_later_step() -> None:
    model = randomize(Telling(Attention(), Mlp()))
    opts = [toca_compile.optimize(model, Fora(STEPS, 3), lowering="eager") for _ in range(2)]
    with torch.no_grad():
        for i in range(2 * STEPS):
            results = [opt(*inputs(i % STEPS)) for opt in opts]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            for value in results[1]:
                value.mul_(10)
