"""Partial attention and tokens with a history of their own, against the literal form."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import toca_compile
from tests.models import PlainDiT, diffusers_dit, randomize, zoo
from tests.oracles.token_series import TokenSeriesOracle
from tests.runs import both_ways
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import Composition, FullCompute, TaylorToCa, VerifyError
from toca_compile.ir.state import State
from toca_compile.lowerings import LOWERINGS
from toca_compile.passes.variants.restrict import Restriction
from toca_compile.policies import Every, Queries, Rule, Selector, Share


class WrittenOut(torch.fx.Interpreter):
    """Counts a variant's FLOPs. torch's counter knows no fused attention on a CPU: it runs as two products."""

    flops: ClassVar[int] = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = super().run(*args, **kwargs)
        type(self).flops += counter.get_total_flops()
        return out

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is torch.ops.aten.scaled_dot_product_attention.default:
            q, k, v = (self.env[x] for x in n.args[:3])
            return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        return super().run_node(n)


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOWERINGS, "counted", lambda variant, examples: WrittenOut(variant.module).run)


KEYS = ["fresh", "update", "keep"]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    interval=st.integers(1, 5), order=st.integers(0, 3), ratio=st.sampled_from([0.0, 0.1, 0.4, 0.9]),
    keys=st.sampled_from([None, *KEYS]), mlp=st.booleans(), update=st.booleans(), warmup=st.integers(1, 3), steps=st.integers(1, 16),
    weight=st.sampled_from([0.0, 0.25]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_the_literal_form(
    traced: Traced, interval: int, order: int, ratio: float, keys: str | None, mlp: bool,
    update: bool, warmup: int, steps: int, weight: float, seed: int,
) -> None:  # fmt: skip
    model, opt = traced(PlainDiT, size=(6, 10), depth=2)
    randomize(model, seed)
    opt.policy = TaylorToCa(
        steps, interval, order, ratio, staleness_weight=weight, keys=keys, mlp=mlp, update=update, warmup=warmup
    )  # fmt: skip
    oracle = TokenSeriesOracle(
        model, interval, order, ratio, keys, mlp=mlp, update=update, warmup=warmup, weight=weight
    )
    x = noise(2, (6, 10), seed=seed)
    torch.testing.assert_close(sample(opt, steps, x), sample(oracle, steps, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", ["update", "keep"])
def test_keys_with_a_refresh_of_their_own(traced: Traced, keys: str) -> None:
    model, opt = traced(PlainDiT, size=(6, 10), depth=3)
    opt.policy = Composition(
        14, Every(6), (Rule(Queries(keys, refresh=2, order=1), kinds=("self_attention",)), Rule(Queries(order=1))),
        which=Selector("error"), how_many=Share(0.4),
    )  # fmt: skip
    oracle = TokenSeriesOracle(model, 6, 1, 0.4, keys, mlp=False, refresh=2)
    x = noise(2, (6, 10))
    torch.testing.assert_close(sample(opt, 14, x), sample(oracle, 14, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(zoo()))
def test_every_style_of_attention(name: str) -> None:
    """The restricted graph equals its dense meaning, and with fresh keys and all tokens but one the plain model nearly."""
    model = zoo()[name]
    x = noise()
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager")
    for keys in KEYS:
        opt.policy = TaylorToCa(6, 3, 1, 0.4, keys=keys)
        outs = both_ways(opt, lambda opt: sample(opt, 6, x))
        assert "queries" in {a for s in toca_compile.explain(opt).sites for a in s.actions}
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4, msg=lambda text, keys=keys: f"keys {keys}: {text}")


def test_selected_rows_are_the_full_models() -> None:
    """With fresh keys, at the first site nothing upstream is stale: its selected rows are what a full step computes."""
    model: Any = randomize(PlainDiT((6, 10), depth=1))
    x, y = noise(2, (6, 10)), torch.arange(2)
    policy = Composition(
        3, Every(2), (Rule(Queries(), kinds=("self_attention",)),), which=Selector("random"), how_many=Share(0.5)
    )  # fmt: skip
    opt = toca_compile.optimize(model, policy, lowering="eager")
    with torch.no_grad():
        opt(x, torch.tensor([900, 900]), y)
        opt(x, torch.tensor([500, 500]), y)
        h, c = model.prepare(x, torch.tensor([500, 500]), y)
        shift, scale, *_ = model.blocks[0].modulation(c).unsqueeze(1).chunk(6, dim=-1)
        wanted = model.blocks[0].attention(model.blocks[0].norm1(h) * (1 + scale) + shift)
    (cache,) = [b for n, b in toca_compile.explain(opt).buffers.items() if n[-3:] == (State.OUTPUT, 0, 0)]
    (fresh,) = [m for n, m in opt.fresh_tokens().items() if "mlp" not in n]
    assert fresh.sum(1).tolist() == [7, 7]
    torch.testing.assert_close(cache[fresh], wanted[fresh])
    assert not torch.allclose(cache[~fresh], wanted[~fresh])


@pytest.mark.parametrize("keys", KEYS)
def test_flops_are_torchs_count(traced: Traced, keys: str) -> None:
    """The second, identical partial step, counted by torch with its fused attention written out."""
    _, opt = traced(diffusers_dit, depth=2, lowering="counted")
    opt.policy = TaylorToCa(4, 4, 1, 0.4, score="random", keys=keys)
    with torch.no_grad():
        for t in (900, 800, 700):
            WrittenOut.flops = 0
            opt(noise(), timestep=torch.full((2,), t), class_labels=torch.arange(2))
    report = toca_compile.explain(opt)
    assert WrittenOut.flops == report.flops("partial", counting="torch")


def test_memory_is_the_tensors_alive() -> None:
    opt = toca_compile.optimize(diffusers_dit(), FullCompute(), lowering="eager")
    for keys in (None, *KEYS):
        opt.policy = TaylorToCa(9, 3, 2, 0.4, keys=keys)
        x = noise()
        with torch.no_grad():
            for _ in range(8):
                opt(x, timestep=torch.full((2,), 500), class_labels=torch.arange(2))
        assert toca_compile.explain(opt).cache_bytes == opt.cache_bytes


def test_causal_attention_takes_queries() -> None:
    """Each of the keys up to its own place."""

    class Causal(PlainDiT):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            h, c = self.prepare(x, t, y)
            for block in self.blocks:
                b, n, w = h.shape
                q, k, v = block.qkv(block.norm1(h)).reshape(b, n, 3, 2, w // 2).permute(2, 0, 3, 1, 4).unbind(0)
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                h = h + block.proj(out.transpose(1, 2).flatten(2))
                h = h + block.mlp(block.norm2(h))
            return self.finish(h, c)

    model, policy = randomize(Causal()), TaylorToCa(4, keys="fresh", score="random")
    opt = toca_compile.optimize(model, policy, lowering="eager")
    torch.testing.assert_close(*both_ways(opt, lambda opt: sample(opt, 4, noise())), rtol=1e-4, atol=1e-4)
    kinds = {s.kind: s.actions for s in toca_compile.explain(opt).sites}
    assert "queries" in kinds["self_attention"]
    assert "partial" in [record.kind for record in opt.steps]


def joint_models() -> dict[str, tuple[Any, Any]]:
    """Models whose attention runs over text and image together, with what one call is given."""
    diffusers = pytest.importorskip("diffusers")
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    video = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    text, pooled = torch.ones(1, 6, 12), torch.ones(1, 12)
    ids = {"img_ids": torch.rand(16, 3), "txt_ids": torch.zeros(6, 3)}
    return {
        "flux": (flux, lambda i: {
            "hidden_states": noise(1, (8, 8), 1).reshape(1, 16, 4), "encoder_hidden_states": text,
            "pooled_projections": pooled, "timestep": torch.tensor([0.9 - i * 0.1]), **ids,
        }),
        "sd3": (sd3, lambda i: {
            "hidden_states": noise(1, (8, 8), 4), "encoder_hidden_states": text, "pooled_projections": pooled,
            "timestep": torch.tensor([900 - i]),
        }),
        "video": (video, lambda i: {
            "hidden_states": noise(1, (3 * 8, 8), 4).reshape(1, 3, 4, 8, 8), "encoder_hidden_states": torch.ones(1, 8, 8),
            "timestep": torch.tensor([900 - i]),
        }),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["flux", "sd3", "video"])
def test_joint_attention_at_one_streams_tokens(name: str) -> None:
    """Rows of the image, or of the text, out of an attention over both equal those of the whole attention."""
    model, call = joint_models()[name]
    randomize(model)
    rule = Rule(Queries(), kinds=("joint_attention",))
    policy = Composition(4, Every(4), (rule,), which=Selector("random"), how_many=Share(0.5))
    opt = toca_compile.optimize(model, policy, lowering="eager")
    with torch.no_grad():
        eager, dense = both_ways(opt, lambda opt: [opt(**call(i), return_dict=False)[0] for i in range(4)])
    report = toca_compile.explain(opt)
    assert any(s.kind == "joint_attention" and "queries" in s.actions for s in report.sites)
    assert report.schedule == "FPPP"
    torch.testing.assert_close(eager, dense, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(eager[1], eager[0])


def test_a_restriction_that_forgets_the_window_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary tables run over text and image; read at the image's places from the front, they are the text's."""
    right = Restriction._leaf

    def wrong(self: Restriction, *args: Any) -> Any:
        carry, self.proof = self.proof, replace(self.proof, windows={})
        try:
            return right(self, *args)
        finally:
            self.proof = carry

    monkeypatch.setattr(Restriction, "_leaf", wrong)
    model, call = joint_models()["flux"]
    rule = Rule(Queries(), kinds=("joint_attention",))
    policy = Composition(4, Every(4), (rule,), which=Selector("random"), how_many=Share(0.5))
    opt = toca_compile.optimize(randomize(model), policy, lowering="eager")
    with torch.no_grad():
        opt(**call(0))
        with pytest.raises(VerifyError, match="dense meaning"):
            opt(**call(1))
