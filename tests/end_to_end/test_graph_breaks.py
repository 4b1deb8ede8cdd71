"""Models that torch.compile splits: what is a site in a fragment, and what is said of the rest."""

import logging
import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, Texted, randomize
from toca_compile import BlockCache, Composition, Fora, FullCompute, NoSiteError, TaylorSeer, ToCa
from toca_compile.policies import Every, Queries, Rule, Selector, Share

STEPS = 4
POLICIES: dict[str, Any] = {
    "frrr": Fora(STEPS, STEPS),
    "frff": TaylorSeer(STEPS, 2, 1),
    "fsfs": BlockCache(STEPS, first=0, interval=2, order=1),
    "fppp": Composition(STEPS, Every(STEPS), (Rule(Queries()),), which=Selector("random"), how_many=Share(0.5)),
}
TOCA = ToCa(STEPS, 4, 0.5, schedule="constant", bonus=0.0)


class Asking(PlainDiT):
    """A number is read on the host between two blocks."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.prepare(x, t, y)
        h = self.blocks[0](h, c)
        if h.sum().item() > 1e30:
            h = 2 * h
        return self.finish(self.blocks[1](h, c), c)


class Core(nn.Module):
    """An attention that cannot be traced: which words there are is read on the host."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor) -> Tensor:
        index = [i for i, is_there in enumerate(there.tolist()) if is_there]
        return F.scaled_dot_product_attention(q, k[:, index], v[:, index])


class Block(nn.Module):
    """An attention and an MLP, gated by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.core, self.out = nn.Linear(8, 24), Core(), nn.Linear(8, 8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, c: Tensor, there: Tensor) -> Tensor:
        x = x + c * self.out(self.core(*self.qkv(self.norm(x)).chunk(3, -1), there))
        return x + c * self.down(F.gelu(self.up(self.norm(x))))


class Unseen(nn.Module):
    """Blocks whose attention lies between the graphs; with one MLP at the end that is no branch."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks, self.time = nn.ModuleList(Block() for _ in range(depth)), nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor, there: Tensor) -> Tensor:
        c = self.time(t[:, None, None] / 1000)
        for block in self.blocks:
            x = block(x, c, there)
        return x


def picture(i: int) -> tuple[Tensor, ...]:
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(i))
    return x, torch.full((2,), 900 - 50 * i), torch.arange(2)


def tokens(i: int) -> tuple[Tensor, ...]:
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(i))
    return x, torch.full((2,), 900.0 - 50 * i), torch.arange(16) % 3 > 0


@torch.no_grad()
def test_blocks_on_either_side_of_a_break_are_sites() -> None:
    net = randomize(Asking(depth=2))
    opt = toca_compile.optimize(net, FullCompute(), lowering="eager")
    assert torch.equal(opt(*picture(0)), net(*picture(0)))
    report = toca_compile.explain(opt)
    assert [s.kind for s in report.sites] == ["self_attention", "mlp"] * 2
    assert "split it into" in str(report)
    assert "test_graph_breaks.py:" in str(report)
    assert "custom_op" in str(report)


@torch.no_grad()
def test_a_branch_without_attention_is_a_site_of_its_fragment() -> None:
    net = randomize(Unseen())
    opt = toca_compile.optimize(net, FullCompute(), lowering="eager")
    dense = toca_compile.optimize(net, TOCA, lowering="dense")
    assert torch.equal(opt(*tokens(0)), net(*tokens(0)))
    assert [(s.kind, s.tokens, "partial" in s.actions) for s in toca_compile.explain(opt).sites] == [("mlp", 16, True)]
    opt.policy = TOCA
    for i in range(STEPS):
        torch.testing.assert_close(opt(*tokens(i)), dense(*tokens(i)))
        fresh = [mask.sum(1).tolist() for mask in opt.fresh_tokens().values()]
        assert fresh == [[16 if i == 0 else 8] * 2]
    opt.policy = Fora(STEPS, STEPS)
    for i in range(STEPS):
        assert torch.equal(opt(*tokens(0)), net(*tokens(0))), i


class Experts(nn.Module):
    """Each token goes to the expert that its router says, and which tokens an expert takes depends on the data."""

    every: ClassVar[dict[int, "Experts"]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out, which = torch.zeros_like(flat), self.router(flat).argmax(-1)
        for i, expert in enumerate(self.experts):
            index = torch.nonzero(which == i).flatten()
            out[index] = expert(flat[index])
        return out.view_as(x)


@torch.library.custom_op("toca_tests::experts", mutates_args=())
def experts(x: Tensor, layer: int) -> Tensor:
    """The experts of a layer as one op."""
    return Experts.every[layer](x)


experts.register_fake(lambda x, layer: torch.empty_like(x))


class Mixture(nn.Module):
    """Attention, and experts that are an op or not."""

    def __init__(self, as_op: bool, layer: int) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.mlp, self.as_op, self.layer = Experts(), as_op, layer
        Experts.every[layer] = self.mlp

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + c * self.out(F.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, -1)))
        return x + c * (experts(self.norm(x), self.layer) if self.as_op else self.mlp(self.norm(x)))


class Mixtures(nn.Module):
    def __init__(self, as_op: bool) -> None:
        super().__init__()
        self.blocks, self.time = nn.ModuleList(Mixture(as_op, i) for i in range(2)), nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t[:, None, None] / 1000)
        for block in self.blocks:
            x = block(x, c)
        return x


@pytest.mark.parametrize("as_op", [False, True])
@torch.no_grad()
def test_experts_that_values_choose_are_an_op(as_op: bool) -> None:
    """One of our own, where they are none. Their branch is a site: it is reused or forecast, and blocks are skipped."""
    net = randomize(Mixtures(as_op))
    opt = toca_compile.optimize(net, FullCompute(), lowering="eager")
    for i in range(2):
        assert torch.equal(opt(*tokens(i)[:2]), net(*tokens(i)[:2]))
    report = toca_compile.explain(opt)
    assert "split it" not in str(report)
    assert [s.kind for s in report.sites] == ["self_attention", "mixer"] * 2
    of_values = "toca.sized_by_values.default holds what has a size that only values tell"
    why = "toca_tests.experts.default has no rule" if as_op else of_values
    assert f"{why} (test_graph_breaks.py:" in str(report.sites[1].reason)
    plain = net(*tokens(0)[:2])
    for kinds, policy in POLICIES.items():
        opt.policy = policy
        for _ in range(STEPS):
            torch.testing.assert_close(opt(*tokens(0)[:2]), plain)
        assert "".join(r.kind.value[0] for r in opt.steps) == kinds


class Nothing(nn.Module):
    """Rows of a linear layer in no branch, and a break."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks, self.first, self.second = breaks, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return F.gelu(self.second(x))


@torch.no_grad()
def test_a_split_model_without_a_site_is_told_so() -> None:
    opt = toca_compile.optimize(Nothing(True).eval(), FullCompute(), lowering="eager")
    with pytest.raises(NoSiteError, match=r"into 2 graphs.*graph_break.*test_graph_breaks\.py:\d+"):
        opt(torch.ones(2, 16, 8))
    whole = toca_compile.optimize(Nothing(False).eval(), FullCompute(), lowering="eager")
    with pytest.raises(NoSiteError) as caught:
        whole(torch.ones(2, 16, 8))
    assert "split" not in str(caught.value)


@torch.no_grad()
def test_torch_compile_says_so_too(caplog: pytest.LogCaptureFixture) -> None:
    options: Any = {"policy": FullCompute(), "lowering": "eager"}
    opt = torch.compile(Nothing(True).eval(), backend="toca", options=options)
    with caplog.at_level(logging.WARNING):
        opt(torch.ones(2, 16, 8))
    assert "graph_break" in caplog.text
    assert caplog.text.count("no site was found") == 1


@torch.no_grad()
def test_an_mlp_without_attention_in_a_whole_model_is_no_site() -> None:
    """Only a fragment has lost what would tell its tokens."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    opt = toca_compile.optimize(Residual().eval(), FullCompute(), lowering="eager")
    with pytest.raises(NoSiteError):
        opt(torch.ones(2, 16, 8))


@torch.no_grad()
def test_mochi() -> None:
    diffusers = pytest.importorskip("diffusers")
    net = randomize(
        diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
            text_embed_dim=16, time_embed_dim=4, max_sequence_length=8,
        )
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 8, 16),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": (torch.arange(8)[None] < torch.tensor([[5], [8]])).float(),
        "return_dict": False,
    }
    opt = toca_compile.optimize(net, FullCompute(), lowering="eager")
    plain = net(**inputs)[0]
    assert torch.equal(opt(**inputs)[0], plain)
    partial = {s.kind: "partial" in s.actions for s in toca_compile.explain(opt).sites}
    assert partial == {"mixer": False, "mlp": True}
    for kinds, policy in {"fppp": TOCA, "fsfs": POLICIES["fsfs"]}.items():
        opt.policy = policy
        for _ in range(STEPS):
            torch.testing.assert_close(opt(**inputs)[0], plain)
        assert "".join(step.kind.value[0] for step in opt.steps) == kinds


class Emptied(PlainDiT):
    """After a break, values that were made before it are written to (GLM-Image), as a mask says."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.prepare(x, t, y)
        torch._dynamo.graph_break()
        kept = h
        h[:, 0] *= 0
        h = h + c[:, None]
        for block in self.blocks:
            h = block(h, c)
        torch._dynamo.graph_break()
        return self.finish(h + kept, c)


@torch.no_grad()
def test_a_fragment_may_write_to_what_was_made_before_it(caplog: pytest.LogCaptureFixture) -> None:
    """What it writes follows from no branch, and the next graph reads it."""
    net = randomize(Emptied(depth=1))
    opt = toca_compile.optimize(net, FullCompute(), lowering="eager")
    dense = toca_compile.optimize(net, TOCA, lowering="dense")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(opt(*picture(0)), net(*picture(0)))
        opt.policy = Fora(STEPS, STEPS)
        for _ in range(STEPS):
            assert torch.equal(opt(*picture(0)), net(*picture(0)))
        opt.policy = TOCA
        for i in range(STEPS):
            torch.testing.assert_close(opt(*picture(i)), dense(*picture(i)))
    assert "in place" not in caplog.text
    assert [s.kind for s in toca_compile.explain(opt).sites] == ["self_attention", "mlp"]


class Handed(Texted):
    """What is computed once a run is given to code behind a break, which changes it."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        h, c = self.prepare(x, t, torch.zeros(x.shape[0], dtype=torch.long))
        words = self.keys[0](text)
        h = self.blocks[0](h + (h @ words.transpose(1, 2)).softmax(-1) @ words, c)
        torch._dynamo.graph_break()
        words.mul_(2)
        return self.finish(self.blocks[1](h + words.mean(1, keepdim=True), c), c)


@torch.no_grad()
def test_what_is_kept_is_nobody_elses_to_change() -> None:
    net = randomize(Handed())
    x, t, _ = picture(0)
    text = torch.randn(2, 5, 8)
    opt = toca_compile.optimize(net, Fora(STEPS, STEPS), lowering="eager")
    for _ in range(STEPS):
        assert torch.equal(opt(x, t, text), net(x, t, text))


class Writes(PlainDiT):
    """What is written after a break: what follows from a block; what another input is a part of; what is given back
    as a part."""

    what = ""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.prepare(x, t, y)
        kept, part = h.clone(), None
        if self.what == "part":
            part = kept[:, :2]
        torch._dynamo.graph_break()
        h = self.blocks[0](h, c)
        if self.what == "branch":
            kept.copy_(h)
        else:
            kept[:, 0] *= 2
        if self.what == "given":
            part = kept[:, :2]
        torch._dynamo.graph_break()
        if part is not None:
            h = h + part.sum(1, keepdim=True)
        return self.finish(self.blocks[1](h + kept, c), c)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("branch", r"follows from a branch that may be cached \(test_graph_breaks\.py:\d+\)"),
        ("given", r"in place \(test_graph_breaks\.py:\d+\); what it gives back shares its memory"),
    ],
)
@torch.no_grad()
def test_other_writes_let_their_fragment_run_as_it_is(caplog: pytest.LogCaptureFixture, what: str, why: str) -> None:
    net: Any = randomize(Writes(depth=2))
    net.what = what
    opt = toca_compile.optimize(net, Fora(STEPS, STEPS), lowering="eager")
    with caplog.at_level(logging.WARNING):
        for _ in range(STEPS):
            assert torch.equal(opt(*picture(0)), net(*picture(0)))
    assert re.search(why, caplog.text), caplog.text
    assert [s.kind for s in toca_compile.explain(opt).sites] == ["self_attention", "mlp"]


class SummedFirst(Asking):
    """The attention of the first graph reads sums of the tokens; that of the second does not."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.prepare(x, t, y)
        q = k = v = self.blocks[0].norm1(h).cumsum(1)
        h = h + self.blocks[0].proj(F.scaled_dot_product_attention(q, k, v))
        if h.sum().item() > 1e30:
            h = 2 * h
        return self.finish(self.blocks[1](h, c), c)


@torch.no_grad()
def test_what_one_graph_cannot_do_another_does(caplog: pytest.LogCaptureFixture) -> None:
    net = randomize(SummedFirst(depth=2))
    policy = Composition(3, Every(3), (Rule(Queries("fresh")),), how_many=Share(0.5))
    opt = toca_compile.optimize(net, policy, lowering="eager")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(opt(*picture(0)), net(*picture(0)))
    assert "in this graph no site can" in caplog.text
    assert "aten.cumsum.default mixes the tokens" in caplog.text
    for _ in range(2):
        torch.testing.assert_close(opt(*picture(0)), net(*picture(0)))
    sites = toca_compile.explain(opt).sites
    assert ["queries" in s.actions for s in sites if s.kind == "self_attention"] == [False, True]
    assert [0 < mask.float().mean() < 1 for mask in opt.fresh_tokens().values()].count(True) == 1
