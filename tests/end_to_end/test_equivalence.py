"""Identities that every model of the suite must keep, in each lowering that needs no compiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import toca_compile
from tests.models import PlainBlock, PlainDiT, Positional, RegisterDiT, diffusers_dit, randomize, zoo
from tests.runs import both_ways
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import Fora, FullCompute, PolicyError, ToCa


def positional() -> nn.Module:
    return Positional(diffusers_dit())


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": PlainDiT, "register": RegisterDiT, "diffusers": positional}
POLICIES = [
    ToCa(num_steps=12, interval=4, fresh_ratio=0.3),
    ToCa(num_steps=12, interval=3, fresh_ratio=0.4, schedule="constant"),
    ToCa(num_steps=12, interval=3, fresh_ratio=0.4, schedule="constant", score="random"),
    ToCa(num_steps=12, interval=3, fresh_ratio=0.4, schedule="constant", score="v_norm"),
    ToCa(num_steps=12, interval=3, fresh_ratio=0.4, schedule="constant", score="none"),
    ToCa(num_steps=12, interval=3, fresh_ratio=0.4, schedule="constant", score_stride=3),
    Fora(num_steps=12, interval=3),
]


@pytest.mark.parametrize("name", MODELS)
def test_identities_of_one_trace(traced: Traced, name: str) -> None:
    """Bit for bit the model where nothing is cached; where every step is full; and the other identities of a policy."""
    model, opt = traced(MODELS[name])
    full_compute_is_the_model_bit_for_bit(opt, model)
    full_steps_are_the_model(opt, model)
    every_token_selected_is_the_dense_path(opt)
    reuse_repeats_the_full_step_and_leaves_caches_alone(opt)


def full_compute_is_the_model_bit_for_bit(opt: Any, model: nn.Module) -> None:
    x = noise()
    assert torch.equal(sample(opt, 4, x), sample(model, 4, x))
    assert opt.cache_bytes == 0


def full_steps_are_the_model(opt: Any, model: nn.Module) -> None:
    opt.policy = ToCa(num_steps=6, interval=1, schedule="constant")
    x = noise()
    assert torch.equal(sample(opt, 6, x), sample(model, 6, x))
    assert {r.kind for r in opt.steps} == {"full"}


def every_token_selected_is_the_dense_path(opt: Any) -> None:
    """With attention reused and all MLP tokens fresh, a step at the inputs of the full step is the full step."""
    opt.policy = ToCa(num_steps=2, interval=2, fresh_ratio=1.0, schedule="constant")
    x, y, t = noise(), torch.arange(2), torch.full((2,), 500)
    with torch.no_grad():
        first, second = opt(x, t, y), opt(x, t, y)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert [r.kind for r in opt.steps] == ["full", "partial"]


def reuse_repeats_the_full_step_and_leaves_caches_alone(opt: Any) -> None:
    opt.policy = Fora(num_steps=4, interval=4)
    x, y, t = noise(), torch.arange(2), torch.full((2,), 500)
    with torch.no_grad():
        first = opt(x, t, y)
        kept = [b.clone() for b in toca_compile.explain(opt).buffers.values()]
        second = opt(x, t, y)
        sample(opt, 1, noise(seed=9))
    assert torch.equal(first, second)
    now = list(toca_compile.explain(opt).buffers.values())
    assert kept
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_gather_scatter_is_dense_and_blend(traced: Traced, name: str) -> None:
    x, (_, opt) = noise(), traced(MODELS[name])
    for policy in POLICIES:
        opt.policy = policy
        runs = both_ways(opt, lambda opt: sample(opt, 12, x))
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5, msg=lambda m, p=policy: f"{p}: {m}")


def test_k_norm_needs_a_fused_attention(traced: Traced) -> None:
    x, policy = noise(), ToCa(num_steps=6, fresh_ratio=0.4, schedule="constant", score="k_norm")
    _, opt = traced(PlainDiT)
    opt.policy = policy
    torch.testing.assert_close(*both_ways(opt, lambda opt: sample(opt, 6, x)), rtol=1e-5, atol=1e-5)
    written_out = toca_compile.optimize(zoo()["register"], policy, lowering="eager")
    with pytest.raises(PolicyError, match=r"k_norm.*models\.py"):
        sample(written_out, 6, x)


class EinsumBlock(PlainBlock):
    """Heads behind tokens: the rows of values are not laid out as in a fused attention."""

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).unbind(2)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5).softmax(-1)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class ByEinsum(PlainDiT):
    """Attention by einsum."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks = nn.ModuleList(EinsumBlock(16, 2) for _ in range(2))


@pytest.mark.parametrize("score", ["attention", "v_norm"])
def test_scores_do_not_depend_on_how_attention_is_written(score: str) -> None:
    """The same weights, fused and by einsum, select the same tokens."""
    policy = ToCa(num_steps=6, interval=3, fresh_ratio=0.3, schedule="constant", score=score)
    fused, written = randomize(PlainDiT(depth=2)), ByEinsum()
    written.load_state_dict(fused.state_dict())
    runs = [sample(toca_compile.optimize(m.eval(), policy, lowering="eager"), 6, noise()) for m in (fused, written)]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from([((8, 8), 1), ((4, 12), 3), ((10, 6), 2)]), ratio=st.floats(0, 1), interval=st.integers(1, 5),
    score=st.sampled_from(["attention", "random", "v_norm", "none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_policy_on_the_foreign_model(
    traced: Traced, shape: tuple[tuple[int, int], int], ratio: float, interval: int, score: str,
    seed: int,
) -> None:  # fmt: skip
    size, depth = shape
    model, opt = traced(RegisterDiT, size=size, depth=depth)
    randomize(model, seed)
    opt.policy = ToCa(num_steps=8, interval=interval, fresh_ratio=ratio, schedule="constant", score=score)
    x = noise(2, size, seed=seed)
    torch.testing.assert_close(*both_ways(opt, lambda opt: sample(opt, 8, x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    policy = ToCa(num_steps=8, interval=4, fresh_ratio=0.3, schedule="constant")
    opt = toca_compile.optimize(zoo()[name], policy, lowering="eager")
    for score in ("attention", "random"):
        opt.policy = ToCa(**{**policy.__dict__, "score": score})
        x, y = noise(3), torch.arange(3)
        mates = torch.cat([x[:1], 6 * x[1:]])
        alone = [sample(opt, 8, x[i : i + 1], y[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(sample(opt, 8, x, y), torch.cat(alone), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sample(opt, 8, mates, y)[:1], alone[0], rtol=1e-4, atol=1e-5)


def test_what_is_found_in_each_style(traced: Traced) -> None:
    for name, make in MODELS.items():
        _, opt = traced(make)
        sample(opt, 1, noise())
        report = toca_compile.explain(opt)
        assert [s.kind for s in report.sites] == ["self_attention", "mlp"] * 2, name
        for site in report.sites:
            assert ("partial" in site.actions) == (site.kind == "mlp"), name
            assert (site.reason is None) == (site.kind == "mlp"), name
        program = toca_compile.explain(opt).program
        assert program.sites[1].axis.grid == (4, 4), name
        assert program.sites[1].axis.offset == (3 if name == "register" else 0), name
        blocks = [s.template for s in program.segments if s.sites]
        assert blocks == [blocks[0]] * 2, f"{name}: one template for all blocks"


def test_depths_and_shapes_of_the_diffusers_model() -> None:
    for settings_ in ({"num_layers": 1}, {"num_layers": 5}, {"sample_size": 12, "attention_head_dim": 4}):
        torch._dynamo.reset()
        model = Positional(diffusers_dit(**settings_)).eval()
        side = settings_.get("sample_size", 8)
        x = noise(2, (side, side))
        opt = toca_compile.optimize(model, POLICIES[0], lowering="eager")
        torch.testing.assert_close(*both_ways(opt, lambda opt, x=x: sample(opt, 12, x)), rtol=1e-5, atol=1e-5)
        opt.policy = FullCompute()
        assert torch.equal(sample(opt, 2, x), sample(model, 2, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inference_mode_and_other_dtypes(dtype: torch.dtype) -> None:
    model = randomize(PlainDiT()).to(dtype)
    opt = toca_compile.optimize(model, POLICIES[1], lowering="eager")
    x, y = noise().to(dtype), torch.arange(2)
    with torch.inference_mode():
        outs = [opt(x, torch.full((2,), 900.0 - 50 * i, dtype=dtype), y) for i in range(6)]
    assert {o.dtype for o in outs} == {dtype}
    assert len(opt.steps) == 6


class Flat(nn.Module):
    """Tokens come in flat: no grid is to be seen in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PlainDiT((8, 12), channels=2)
        self.embed = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = self.inner.labels(y)
        tokens = self.embed(x)
        for block in self.inner.blocks:
            tokens = block(tokens, c)
        return self.inner.head(tokens)


def test_a_grid_that_the_graph_does_not_show_can_be_given(caplog: pytest.LogCaptureFixture) -> None:
    model = randomize(Flat())
    policy = ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant", bonus=0.6)
    x, t, y = torch.randn(2, 24, 8), torch.zeros(2), torch.arange(2)
    grids = []
    for grid in (None, (4, 6), (6, 4)):
        opt = toca_compile.optimize(model, policy, lowering="eager", grid=grid)
        with torch.no_grad():
            for _ in range(3):
                opt(x, t, y)
        grids.append(toca_compile.explain(opt).program.sites[1].axis.grid)
    assert grids == [None, (4, 6), (6, 4)]
    assert len([r for r in caplog.records if "grid=(height, width)" in r.message]) == 1


class Encoder(PlainDiT):
    """Blocks are torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, norm_first=True, activation="gelu")
        self.blocks = nn.ModuleList([layer, nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)])

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tokens, c = self.prepare(x, t, y)
        tokens = tokens + c[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.finish(tokens, c)


class MultiheadBlock(PlainBlock):
    """Attention is torch's own module, with or without its averaged weights."""

    def __init__(self, weights: bool) -> None:
        super().__init__(16, 2)
        self.weights, self.inner = weights, nn.MultiheadAttention(16, 2, batch_first=True)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x, x, x, need_weights=self.weights)[0]
        return out


class WithMultihead(PlainDiT):
    """One block of each kind."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks = nn.ModuleList([MultiheadBlock(False), MultiheadBlock(True)])


@pytest.mark.parametrize("style", [Encoder, WithMultihead])
def test_blocks_of_torch_itself(style: type[nn.Module]) -> None:
    model = randomize(style())
    policy = ToCa(num_steps=6, interval=3, fresh_ratio=0.3, schedule="constant")
    opt = toca_compile.optimize(model, policy, lowering="eager")
    torch.testing.assert_close(*both_ways(opt, lambda opt: sample(opt, 6, noise())), rtol=1e-5, atol=1e-5)
    opt.policy = FullCompute()
    torch.testing.assert_close(sample(opt, 3, noise()), sample(model, 3, noise()), rtol=1e-4, atol=1e-4)
    assert [s.kind for s in toca_compile.explain(opt).sites] == ["self_attention", "mlp"] * 2
    assert torch.backends.mha.get_fastpath_enabled()
