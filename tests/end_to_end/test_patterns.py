"""Patterns of published models, each written by hand and as small as it can be: they are sites, and may be computed in
part.

At inputs that stay, what is kept is what would be computed, so every policy must give the plain model's output; at inputs
that change, a partial step is held against its dense meaning.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import toca_compile
from tests.models import randomize
from tests.runs import same_as_dense
from toca_compile import Composition, ToCa
from toca_compile.compiler.cost import K
from toca_compile.lowerings import LOWERINGS
from toca_compile.policies import Every, Partial, Queries, Rule, Selector, Share

WIDTH, HEADS, TOKENS, WORDS, STEPS = 8, 2, 16, 4, 3
Inputs = Callable[[int], tuple[Tensor, ...]]


def some(*actions: Any) -> Composition:
    """Half of the tokens, of all sites that can."""
    rules = tuple(Rule(action) for action in actions)
    return Composition(STEPS, Every(3), rules, which=Selector("random"), how_many=Share(0.5))


PARTIAL = some(Partial())
FRESH, UPDATE = some(Queries("fresh")), some(Queries("update"))


def inputs(i: int) -> tuple[Tensor, ...]:
    """A picture that changes from step to step, and words that do not."""
    first, change = (torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (1, 2 + i))
    return first + 0.3 * i * change, torch.randn(2, WORDS, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check(model: nn.Module, policies: Sequence[Any], make: Inputs = inputs) -> list[toca_compile.report.SiteReport]:
    """Full steps are the model, bit by bit; others are as the module says. Returns the sites."""
    model = randomize(model)

    def look(eager: Any) -> None:
        masks = eager.fresh_tokens().values()
        assert any(0 < mask.float().mean() < 1 for mask in masks)
        assert all(set(mask.sum(1).tolist()) <= {0, mask.shape[1] // 2, mask.shape[1]} for mask in masks)

    eager = same_as_dense(model, policies, [make(i) for i in range(STEPS)], look)
    return list(toca_compile.explain(eager).sites)


def heads(x: Tensor) -> Tensor:
    """``[batch, heads, tokens, d]``."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Joint(nn.Module):
    """A picture and words, each with a residual of its own, through one attention and one MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.register_buffer("angles", torch.linspace(0, 3, TOKENS)[:, None] * torch.ones(WIDTH // HEADS))

    def rotate(self, x: Tensor) -> Tensor:
        """The picture's part of queries or keys, by place."""
        return x * self.angles.cos() + x.flip(-1) * self.angles.sin()

    def joined(self, q: Tensor, k: Tensor, words: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, heads apart, ready for attention."""
        return q, k

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        words = y.shape[1]
        q, k, v = (heads(part) for part in self.qkv(self.norm(torch.cat([y, x], 1))).chunk(3, -1))
        q, k = self.joined(q, k, words)
        out = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x, y = x + out[:, words:], y + out[:, :words]
        both = self.down(F.gelu(self.up(self.norm2(torch.cat([y, x], 1)))))
        return torch.cat([y + both[:, :words], x + both[:, words:]], 1)


class WrittenOver(Joint):
    """Positions are written into the picture's part (CogView4, EasyAnimate)."""

    def joined(self, q: Tensor, k: Tensor, words: int) -> tuple[Tensor, Tensor]:
        q[:, :, words:] = self.rotate(q[:, :, words:])
        k[:, :, words:] = self.rotate(k[:, :, words:])
        return q, k


class WrittenWhole(Joint):
    """All of it is written over, by what has positions in a part."""

    def joined(self, q: Tensor, k: Tensor, words: int) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        out[:, :, :] = torch.cat([q[:, :, :words], self.rotate(q[:, :, words:])], 2)
        return out, k


class NothingPassed(Joint):
    """A part of the features has no positions, and that part is empty (ERNIE-Image)."""

    def joined(self, q: Tensor, k: Tensor, words: int) -> tuple[Tensor, Tensor]:
        full = WIDTH // HEADS
        return tuple(torch.cat([2 * part[..., :full], part[..., full:]], -1) for part in (q, k))  # type: ignore[return-value]


@pytest.mark.parametrize("style", [Joint, WrittenOver, WrittenWhole, NothingPassed])
def test_words_and_picture_in_one_attention(style: type[nn.Module]) -> None:
    sites = check(style(), [PARTIAL, FRESH, UPDATE])
    assert [("queries" in s.actions, "partial" in s.actions) for s in sites] == [(True, False)] * 2 + [
        (False, True)
    ] * 2


@torch.no_grad()
def test_what_two_streams_share_is_computed_and_counted_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One MLP on words and picture joined (CogVideoX): for some tokens of each it costs what those cost."""
    spent = 0

    def counted(variant: Any, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal spent
            with FlopCounterMode(display=False) as counter:
                out = variant.module(*args)
            spent += counter.get_total_flops()
            return out

        return run

    monkeypatch.setitem(LOWERINGS, "counted", counted)
    opt = toca_compile.optimize(randomize(Joint()), PARTIAL, lowering="counted")
    opt(*inputs(0))
    spent = 0
    opt(*inputs(1))
    report = toca_compile.explain(opt)
    assert spent == report.flops("partial", counting="torch")
    mlps = [s for s in report.sites if s.kind == "mlp"]
    whole = sum(s.flops_partial.subs({K: s.tokens}) for s in mlps if s.flops_partial is not None)
    assert whole == mlps[0].flops == mlps[1].flops


@pytest.mark.parametrize("words", [0, 1])
def test_no_words_and_one(words: int) -> None:
    sites = check(Joint(), [PARTIAL, FRESH], lambda i: (inputs(i)[0], inputs(i)[1][:, :words]))
    picture = [s for s in sites if s.tokens == TOKENS]
    assert ["queries" in s.actions or "partial" in s.actions for s in picture] == [True, True]


class Near(nn.Module):
    """Tokens attend to their neighbours, by a mask that all samples share (ACE-Step)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        far = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() > 2
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(far, -torch.inf)
        self.register_buffer("mask", mask[(None,) * (rank - 2)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_mask_that_all_samples_share(rank: int) -> None:
    (site,) = check(Near(rank), [FRESH, UPDATE])
    assert "queries" in site.actions


class Apart(nn.Module):
    """Words and picture in one stream, apart for the positions and joined again (HunyuanVideo's single blocks)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH + 16, WIDTH)
        self.mlp = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            both, words = torch.cat([x, y], 1), y.shape[1]
            z = self.norm(both)
            x, y = z[:, :-words], z[:, -words:]
            q, k, v = (heads(part) for part in self.qkv(torch.cat([x, y], 1)).chunk(3, -1))
            q, k = (torch.cat([2 * part[:, :, :-words], part[:, :, -words:]], 2) for part in (q, k))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            out = torch.cat([out[:, :-words], out[:, -words:]], 1)
            both = both + self.out(torch.cat([out, F.gelu(self.mlp(z))], 2))
            x, y = both.split([both.shape[1] - words, words], 1)
        return torch.cat([x, y], 1)


def test_streams_taken_apart_and_joined_again() -> None:
    sites = check(Apart(), [PARTIAL, FRESH, UPDATE])
    assert [(s.kind, s.tokens, "partial" in s.actions) for s in sites] == [("parallel", TOKENS + WORDS, True)] * 2
    assert all("queries" in s.actions for s in sites)


class Placed(Apart):
    """Rotary positions, a table of frames and patches, for the picture's tokens alone; words of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 6, TOKENS * 2).reshape(TOKENS, 2))
        self.of_words, self.frames = nn.Linear(4, 4), nn.Parameter(torch.empty(4, 4, 1))

    def placed(self, part: Tensor, words: int) -> Tensor:
        first, second = part[:, :, :-words].chunk(2, -1)
        turned = torch.cat([first * self.table.cos() - second * self.table.sin(), second * self.table.sin()], -1)
        turned = turned.unflatten(2, (4, 4)) * self.frames
        return torch.cat([turned.flatten(2, 3), self.of_words(part[:, :, -words:]).tanh()], 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both, words = torch.cat([x, y], 1), y.shape[1]
        for _ in range(2):
            z = self.norm(both)
            q, k, v = (heads(part) for part in self.qkv(z).chunk(3, -1))
            out = F.scaled_dot_product_attention(self.placed(q, words), self.placed(k, words), v)
            both = both + self.out(torch.cat([out.transpose(1, 2).flatten(2), F.gelu(self.mlp(z))], 2))
        return both


def test_positions_for_a_part_of_the_tokens() -> None:
    sites = check(Placed(), [PARTIAL, FRESH, UPDATE])
    assert all({"queries", "partial"} <= s.actions for s in sites)


class Elsewhere(Placed):
    """The words' queries are not of these tokens, but of the picture's."""

    def placed(self, part: Tensor, words: int) -> Tensor:
        return torch.cat([part[:, :, :-words], part[:, :, :words]], 2)


def test_parts_that_are_cut_out_elsewhere_are_no_parts() -> None:
    assert "joins tokens that it cuts out elsewhere (test_patterns.py:" in no_queries(Elsewhere())


class Registers(Joint):
    """A few learned tokens stand before the words in their stream (AuraFlow)."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, torch.cat([self.learned.expand(y.shape[0], -1, -1), y], 1))


def test_a_stream_that_is_itself_joined() -> None:
    sites = check(Registers(), [PARTIAL, FRESH, UPDATE])
    assert sorted(s.tokens for s in sites) == [WORDS + 3] * 2 + [TOKENS] * 2
    assert all("queries" in s.actions or "partial" in s.actions for s in sites)


class Frames(nn.Module):
    """A video ``[batch, frames, places, width]`` whose places attend to each other, frame by frame (Latte)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix, self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def attend(self, x: Tensor, qkv: nn.Linear) -> Tensor:
        """Along the last dimension but one."""
        q, k, v = (heads(part) for part in qkv(self.norm(x)).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        b, frames, places = x.shape[0], 2, TOKENS // 2
        x = x.reshape(b, frames, places, WIDTH)
        x = x + self.out(self.attend(x.flatten(0, 1), self.qkv)).reshape(x.shape)
        along = self.attend(x.transpose(1, 2).flatten(0, 1), self.mix)
        x = x + along.reshape(b, places, frames, WIDTH).transpose(1, 2)
        return x + self.down(F.gelu(self.up(x)))


def test_places_of_a_frame_take_queries() -> None:
    sites = check(Frames(), [PARTIAL, FRESH], lambda i: tuple(v[:1] for v in inputs(i)))
    assert [sorted(s.actions & {"partial", "queries"}) for s in sites] == [["queries"], ["partial"], ["partial"]]


class Turned(nn.Module):
    """Attention alone, on tokens that are turned round before it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x.flip(1)).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("policy", [PARTIAL, ToCa(STEPS, 3, 0.5, schedule="constant", bonus=0.0)])
def test_a_policy_that_can_do_nothing_in_part_says_why(policy: Any, caplog: pytest.LogCaptureFixture) -> None:
    opt = toca_compile.optimize(randomize(Turned()), policy, lowering="eager")
    with caplog.at_level(logging.WARNING):
        for i in range(STEPS):
            opt(*inputs(i))
    assert caplog.text.count("no site can") == 1
    assert "test_patterns.py:" in caplog.text


@torch.no_grad()
def test_a_policy_that_can_do_something_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    opt = toca_compile.optimize(randomize(Joint()), PARTIAL, lowering="eager")
    with caplog.at_level(logging.WARNING):
        opt(*inputs(0))
    assert "no site can" not in caplog.text


class Block(nn.Module):
    """Self-attention, and then a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x))
        return x + self.mlp(self.norm2(x))


EXPERTS = 4


class Routed(Block):
    """An MLP of experts, of which each token takes two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.ups, self.downs = (nn.Parameter(torch.empty(EXPERTS, *size)) for size in ((WIDTH, 16), (16, WIDTH)))

    def experts(self, x: Tensor, i: int) -> Tensor:
        return F.gelu(x @ self.ups[i]) @ self.downs[i]

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).softmax(-1).topk(2, -1)


class AllWeighted(Routed):
    """All experts see all tokens; what was not chosen weighs nothing."""

    def mlp(self, x: Tensor) -> Tensor:
        weights, which = self.chosen(x)
        weights = x.new_zeros(*x.shape[:2], EXPERTS).scatter(-1, which, weights)
        return torch.stack([weights[..., i : i + 1] * self.experts(x, i) for i in range(EXPERTS)]).sum(0)


class OneHot(Routed):
    """Weights by one-hot vectors; all experts in one product."""

    def mlp(self, x: Tensor) -> Tensor:
        weights, which = self.chosen(x)
        weights = (F.one_hot(which, EXPERTS) * weights[..., None]).sum(-2)
        inner = F.gelu(torch.einsum("bnd,edh->bneh", x, self.ups))
        return torch.einsum("bneh,ehd,bne->bnd", inner, self.downs, weights)


class LeftOut(Routed):
    """What was not chosen is written over before the softmax."""

    def mlp(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        scores[scores < scores.topk(2, -1).values[..., -1:]] = -torch.inf
        weights = scores.softmax(-1)
        return sum((weights[..., i : i + 1] * self.experts(x, i) for i in range(EXPERTS)), torch.zeros_like(x))


class OwnWeights(Routed):
    """Each token's experts are taken out of the weights, all samples in one row, each token as often as it has
    experts."""

    def mlp(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, which = self.chosen(rows)
        often, flat = rows.repeat_interleave(2, 0), which.flatten()
        made = torch.bmm(F.gelu(torch.bmm(often[:, None], self.ups[flat])), self.downs[flat])
        return (made.reshape(-1, 2, WIDTH) * weights[..., None]).sum(1).reshape(x.shape)


class Repeated(Routed):
    """As many copies of the tokens as there are experts, one after the other, of which each token takes its own."""

    def mlp(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        weights, which = self.chosen(x)
        copies = x.repeat(1, EXPERTS, 1).reshape(b, EXPERTS, n, WIDTH)
        made = torch.stack([self.experts(copies[:, i], i) for i in range(EXPERTS)], 2)
        return (made.take_along_dim(which[..., None], 2) * weights[..., None]).sum(2)


class Pixels(Block):
    """Convolutions of single pixels on a picture, and one slope for all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Conv2d(WIDTH, 16, 1), nn.PReLU(), nn.Conv2d(16, WIDTH, 1)  # type: ignore[assignment]

    def mlp(self, x: Tensor) -> Tensor:
        gate, picture = self.act(self.up(x.transpose(1, 2).unflatten(2, (4, 4)))).chunk(2, 1)
        return self.down(torch.cat([gate, picture.sigmoid()], 1)).flatten(2).transpose(1, 2)


class AllPixels(nn.Module):
    """A picture ``[batch, channels, height, width]`` all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.up, self.down = nn.Conv2d(WIDTH, 16, 1, groups=2), nn.Conv2d(16, WIDTH, 1, bias=False)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (WIDTH,)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.transpose(1, 2).unflatten(2, (4, 4))
        q, k, v = (heads(part.flatten(2).transpose(1, 2)) for part in self.qkv(self.norm(x)).chunk(3, 1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        x = x + self.out(out.unflatten(2, (4, 4)))
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("style", [AllWeighted, OneHot, LeftOut, OwnWeights, Repeated, Pixels, AllPixels])
def test_what_depends_on_each_token_alone(style: type[nn.Module]) -> None:
    sites = check(style(), [PARTIAL, FRESH])
    assert [sorted(s.actions & {"partial", "queries"}) for s in sites] == [["queries"], ["partial"]]


class InTurn(Routed):
    """Tokens in the order of their experts."""

    def mlp(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        which = self.chosen(rows)[1]
        order = which.flatten().argsort()
        made = torch.bmm(rows[order // 2][:, None], self.ups[which.flatten()[order]]) @ self.downs[0]
        return torch.zeros_like(rows).index_add(0, order // 2, made[:, 0]).reshape(x.shape)


class Choosing(Routed):
    """Each expert takes four tokens."""

    def mlp(self, x: Tensor) -> Tensor:
        weights, which = self.gate(x).softmax(-1).transpose(1, 2).topk(4, -1)
        which = which.flatten(1)[..., None].expand(-1, -1, WIDTH)
        inner = F.gelu(torch.einsum("becd,edh->bech", x.gather(1, which).unflatten(1, (EXPERTS, 4)), self.ups))
        made = torch.einsum("bech,ehd->becd", inner, self.downs) * weights[..., None]
        return torch.zeros_like(x).scatter_add(1, which, made.flatten(1, 2))


@pytest.mark.parametrize(("style", "op"), [(InTurn, "index_add"), (Choosing, "scatter_add")])
def test_tokens_that_experts_put_in_order_are_reused(style: type[nn.Module], op: str) -> None:
    _, site = check(style(), [FRESH])
    assert "partial" not in site.actions
    assert site.reason is not None
    assert f"aten.{op}.default mixes the tokens (test_patterns.py:" in site.reason


class Windows(Block):
    """Tokens of a picture attend within windows of two by two (Swin), which are moved or padded first."""

    how = ""

    def attend(self, x: Tensor) -> Tensor:
        rows = x.unflatten(1, (4, 4))
        if self.how == "moved":
            rows = rows.roll((-1, -1), (1, 2))
        if self.how == "padded":
            rows = F.pad(rows, (0, 0, 0, 2, 0, 2))
        size = rows.shape[1] // 2
        apart = rows.unflatten(2, (2, size)).unflatten(1, (2, size)).transpose(2, 3)
        out = super().attend(apart.flatten(3, 4).flatten(0, 2)).reshape(apart.shape)
        rows = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.how == "moved":
            rows = rows.roll((1, 1), (1, 2))
        return rows[:, :4, :4].flatten(1, 2)


class Moved(Windows):
    how = "moved"


class Padded(Windows):
    how = "padded"


@pytest.mark.parametrize(
    ("style", "why"),
    [
        (Moved, "aten.roll.default mixes the tokens"),
        (Padded, "rearranges the tokens"),
    ],
)
def test_attention_within_windows_is_reused_and_the_rest_is_partial(style: type[nn.Module], why: str) -> None:
    attention, mlp = check(style(), [PARTIAL])
    assert [(s.kind, s.tokens) for s in (attention, mlp)] == [("self_attention", TOKENS), ("mlp", TOKENS)]
    assert ("partial" in mlp.actions, "queries" in attention.actions) == (True, False)
    assert why in no_queries(style())


@torch.no_grad()
def no_queries(model: nn.Module) -> str:
    """Why the first site takes none, as a policy is told that asks for them."""
    opt = toca_compile.optimize(model.eval(), some(Queries("fresh")), lowering="eager")
    with pytest.raises(toca_compile.PolicyError) as raised:
        opt(*inputs(0))
    return str(raised.value)


class InOneRow(Block):
    """Samples and tokens in one dimension of a stream ``[(batch tokens), width]``."""

    turned = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = (x.transpose(0, 1) if self.turned else x).flatten(0, 1)
        return super().forward(rows, y)

    def attend(self, x: Tensor) -> Tensor:
        if self.turned:
            return super().attend(x.unflatten(0, (TOKENS, -1)).transpose(0, 1)).transpose(0, 1).flatten(0, 1)
        return super().attend(x.unflatten(0, (-1, TOKENS))).flatten(0, 1)


class TokensFirst(InOneRow):
    turned = True


def test_samples_and_tokens_in_one_dimension() -> None:
    sites = check(InOneRow(), [PARTIAL, FRESH, UPDATE, some_by("error"), some_by("attention")])
    assert [(sorted(s.actions & {"partial", "queries"}), s.tokens) for s in sites] == [
        (["queries"], TOKENS),
        (["partial"], TOKENS),
    ]


def some_by(score: str) -> Composition:
    """Half of the tokens, by a score; the others are forecast, each from its own past."""
    rules = (Rule(Queries("fresh", order=1), kinds=("self_attention",)), Rule(Partial(order=1)))
    return Composition(STEPS, Every(3), rules, which=Selector(score), how_many=Share(0.5))


def test_tokens_before_samples_in_one_dimension_are_selected_among_all_samples() -> None:
    _, mlp = check(TokensFirst(), [PARTIAL])
    assert ("partial" in mlp.actions, mlp.tokens) == (True, 2 * TOKENS)


class Linear(Block):
    """Keys are contracted with values first, without a softmax (Sana's, in matmuls)."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        q, k = q.relu(), k.relu()
        return self.out((q @ (k.mT @ v) / (q @ k.sum(-2)[..., None] + 1e-2)).transpose(1, 2).flatten(2))


class LinearWithOnes(Block):
    """Features before tokens; the sum of the weights is one more feature of the values (Sana's)."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part).mT for part in self.qkv(x).chunk(3, -1))
        out = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.relu().mT @ q.relu()
        return self.out((out[:, :, :-1] / (out[:, :, -1:] + 1e-2)).flatten(1, 2).mT)


class LinearBySum(Block):
    """In einsums, of features that are positive."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = 1 / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
        return self.out(torch.einsum("bnhd,bhde,bnh->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, v), total).flatten(2))


class OfFeatures(Block):
    """Features attend to each other, by what they are over all tokens (XCiT)."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        weights = (F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1)
        return self.out((v @ weights.mT).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("style", [Linear, LinearWithOnes, LinearBySum, OfFeatures])
def test_attention_without_a_softmax_over_tokens(style: type[nn.Module]) -> None:
    attention, mlp = check(style(), [PARTIAL, FRESH])
    assert [(s.kind, s.tokens) for s in (attention, mlp)] == [("self_attention", TOKENS), ("mlp", TOKENS)]
    assert ("queries" in attention.actions, "partial" in mlp.actions) == (True, True)


class Looking(LinearWithOnes):
    """The MLP looks at the neighbours of each token (Sana's, without its text)."""

    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def mlp(self, x: Tensor) -> Tensor:
        hidden = self.around(self.up(x).mT.unflatten(2, (4, 4)))
        return self.down(F.gelu(hidden.flatten(2).mT))


def test_places_that_a_convolution_looks_around_are_no_features() -> None:
    attention, mixer = check(Looking(), [FRESH, UPDATE])
    assert [(s.kind, s.tokens) for s in (attention, mixer)] == [("self_attention", TOKENS), ("mixer", TOKENS)]
    assert ("queries" in attention.actions, "partial" in mixer.actions) == (True, False)


class Convolved(Block):
    """No attention: tokens are told by what looks around each."""

    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        return self.out(self.around(x.mT.unflatten(2, (4, 4))).flatten(2).mT)


class Running(Block):
    """Each token reads those before it by a running sum of keys times values."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part).exp() for part in self.qkv(x).chunk(3, -1))
        read = torch.einsum("bhnd,bhnde->bhne", q, (k[..., None] * v[..., None, :]).cumsum(2))
        return self.out((read / (q * k.cumsum(2)).sum(-1, keepdim=True)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("style", [Convolved, Running])
def test_without_an_attention_tokens_are_rows_that_something_mixes(style: type[nn.Module]) -> None:
    mixer, mlp = check(style(), [PARTIAL])
    assert [(s.kind, s.tokens) for s in (mixer, mlp)] == [("mixer", TOKENS), ("mlp", TOKENS)]
    assert ("partial" in mixer.actions, "partial" in mlp.actions) == (False, True)


class Sunk(Block):
    """A weight that is learned stands beside those of the keys in the softmax, and is left out after it."""

    def __init__(self) -> None:
        super().__init__()
        self.sink, self.bias = nn.Parameter(torch.randn(HEADS)), nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT + self.bias
        scores = torch.cat([scores, self.sink[None, :, None, None].expand(*scores.shape[:-1], 1)], -1)
        return self.out((scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2))


def test_a_sink_beside_the_keys_hides_no_attention() -> None:
    attention, mlp = check(Sunk(), [PARTIAL, FRESH])
    assert (attention.kind, "queries" in attention.actions, "partial" in mlp.actions) == ("self_attention", True, True)


class Causal(Block):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class CausalOfMany(Causal):
    """Samples beside heads, so that it is not the rows alone which are counted."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part).flatten(0, 1) for part in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2))


def test_what_counts_its_queries_is_told_which_they_are() -> None:
    attention, _ = check(Causal(), [PARTIAL, FRESH, UPDATE])
    assert "queries" in attention.actions
    attention, _ = check(CausalOfMany(), [PARTIAL])
    why = "is causal by is_causal=True, not by a mask, and counts the queries (test_patterns.py:"
    assert "queries" not in attention.actions
    assert why in str(attention.reason)
    assert why in no_queries(CausalOfMany())


class Streams(Block):
    """Two residual streams, of which each branch reads a mixture, and which it mixes as it adds to them
    (hyper-connections)."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = (nn.Parameter(torch.randn(2, 2)) for _ in range(2))
        self.mix = nn.Parameter(torch.randn(2, 2, 2))

    def weights(self, i: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How streams ``[batch, tokens, stream, width]`` are read, written to and mixed by branch ``i``."""
        return self.read[i], self.write[i], self.mix[i]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x[:, :, None].expand(-1, -1, 2, -1)
        for i, branch in enumerate((lambda z: self.attend(self.norm(z)), lambda z: self.mlp(self.norm2(z)))):
            read, write, mix = self.weights(i, h)
            out = branch((read[..., None] * h).sum(2))
            h = mix @ h + write[..., None] * out[:, :, None]
        return h.sum(2)


class StreamsOfTheirOwn(Streams):
    """Each token says how its streams are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.say = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(2))

    def weights(self, i: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        said = self.say[i](F.layer_norm(h.mean(2), (WIDTH,))).tanh()
        return said[..., :2], said[..., 2:4], said[..., 4:].unflatten(-1, (2, 2))


@pytest.mark.parametrize("style", [Streams, StreamsOfTheirOwn])
def test_streams_that_are_mixed_at_each_branch(style: type[nn.Module]) -> None:
    attention, mlp = check(style(), [PARTIAL, FRESH])
    assert ("queries" in attention.actions, "partial" in mlp.actions) == (True, True)
    assert [s.tokens for s in (attention, mlp)] == [TOKENS, TOKENS]


class Packed(Block):
    """Several pictures in one sequence: each attends within itself (NaViT, OmniGen's and Z-Image's batches)."""

    sizes: tuple[int, ...] = (6, 7, 3)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.apart(q, k, v).transpose(1, 2).flatten(2))

    def apart(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pictures = zip(*(part.split(self.sizes, 2) for part in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*picture) for picture in pictures], 2)


class PackedAlike(Packed):
    sizes = (8, 8)


class PackedInto(Packed):
    """What each picture gives is written where it lies."""

    def apart(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, at = torch.empty_like(q), 0
        for size in self.sizes:
            here = (slice(None), slice(None), slice(at, at + size))
            out[here] = F.scaled_dot_product_attention(q[here], k[here], v[here])
            at += size
        return out


@pytest.mark.parametrize("style", [Packed, PackedAlike, PackedInto])
def test_pictures_in_one_sequence_that_attend_within_themselves(style: type[nn.Module]) -> None:
    attention, mlp = check(style(), [PARTIAL, FRESH, UPDATE])
    assert [(s.kind, s.tokens) for s in (attention, mlp)] == [("self_attention", TOKENS), ("mlp", TOKENS)]
    assert ("queries" in attention.actions, "partial" in mlp.actions) == (True, True)


class MixedByLayer(Block):
    """No attention: an MLP over the tokens of each channel (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Sequential(nn.Linear(TOKENS, 24), nn.GELU(), nn.Linear(24, TOKENS))

    def attend(self, x: Tensor) -> Tensor:
        return self.along(x.mT).mT


class MixedByMatrix(Block):
    """One matrix over the tokens, and no norm to tell which are the features (ResMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(TOKENS, TOKENS))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.matrix @ (x * self.scale)
        return x + self.mlp(x)


class Gated(Block):
    """Half of the hidden units are mixed over tokens and gate the others (gMLP); an MLP behind."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.inner, self.along = nn.Linear(WIDTH, 24), nn.LayerNorm(12), nn.Conv1d(TOKENS, TOKENS, 1)
        self.narrow = nn.Linear(12, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.wide(x)).chunk(2, -1)
        return self.narrow(u * self.along(self.inner(v)))


@pytest.mark.parametrize("style", [MixedByLayer, MixedByMatrix, Gated])
def test_tokens_that_a_layer_mixes(style: type[nn.Module]) -> None:
    mixer, mlp = check(style(), [PARTIAL])
    assert [(s.kind, s.tokens) for s in (mixer, mlp)] == [("mixer", TOKENS), ("mlp", TOKENS)]
    assert ("partial" in mixer.actions, "partial" in mlp.actions) == (False, True)
    assert "mixes the tokens (test_patterns.py:" in str(mixer.reason)
