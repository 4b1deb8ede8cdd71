"""Bad input gets its own error, with cause and remedy, and leaves the user's model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainBlock, PlainDiT, randomize
from tests.runs import both_ways
from tests.sampling import noise, sample
from toca_compile import BlockCache, Fora, FullCompute, InferenceModeError, NoSiteError, PolicyError, ToCa, TocaError

POLICY = ToCa(num_steps=8, interval=4, fresh_ratio=0.3, schedule="constant")


def call(model: Any) -> Tensor:
    out: Tensor = model(noise(), torch.full((2,), 500), torch.arange(2))
    return out


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("num_steps", 2.5), ("interval", 0), ("fresh_ratio", -0.1), ("fresh_ratio", 1.01),
     ("schedule", "cosine"), ("score", "entropies"), ("cell", 0), ("score_stride", 0), ("layer_span", 0),
     ("sensitive", (0.5, 0.2)), ("interval_slope", 1.0)],
)  # fmt: skip
def test_numbers_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=field):
        ToCa(**{field: value})


def test_unknown_names() -> None:
    with pytest.raises(PolicyError, match="dit-xl-2/ddim-50"):
        toca_compile.preset("dit-xl-2/ddim-500")
    with pytest.raises(PolicyError, match="colour"):
        toca_compile.preset("dit-xl-2/ddim-50", colour=1)
    with pytest.raises(TocaError, match="inductor"):
        toca_compile.optimize(PlainDiT(), POLICY, lowering="tvm")
    with pytest.raises(PolicyError, match="caching policy"):
        toca_compile.optimize(PlainDiT(), "toca")  # type: ignore[arg-type]
    with pytest.raises(TocaError, match=r"torch\.nn\.Module"):
        toca_compile.optimize(len, POLICY)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="grid"):
        toca_compile.optimize(PlainDiT(), POLICY, grid=(0, 4))


class Perceptron(nn.Module):
    """No attention, so no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x + self.net(x)


@pytest.mark.parametrize("call", [toca_compile.optimize, toca_compile.enable_cache])
def test_an_unknown_option_is_named_with_those_there_are(call: Any) -> None:
    with pytest.raises(TocaError, match=r"no option 'compile'; there are lowering, .*mode"):
        call(PlainDiT(depth=1), Fora(8, 4), compile=True)


def test_no_transformer() -> None:
    model = Perceptron().eval()
    opt = toca_compile.optimize(model, POLICY, lowering="eager")
    with torch.no_grad(), pytest.raises(NoSiteError, match="Perceptron"):
        call(opt)
    with torch.no_grad():
        assert call(model).shape == noise().shape


def test_no_transformer_through_torch_compile() -> None:
    opt = torch.compile(Perceptron().eval(), backend="toca", options={"policy": POLICY, "lowering": "eager"})
    with torch.no_grad(), pytest.raises(NoSiteError, match="nothing to cache"):
        call(opt)


def test_not_strict_warns_once_and_runs(caplog: pytest.LogCaptureFixture) -> None:
    model = Perceptron().eval()
    opt = toca_compile.optimize(model, POLICY, lowering="eager", strict=False)
    with torch.no_grad():
        assert torch.equal(call(opt), call(model))
        call(opt)
    assert len([r for r in caplog.records if "no site" in r.message]) == 1


@pytest.mark.parametrize("entry", ["optimize", "backend"])
def test_grad_enabled(entry: str) -> None:
    model = randomize(PlainDiT())
    if entry == "optimize":
        opt: Any = toca_compile.optimize(model, POLICY, lowering="eager")
    else:
        opt = torch.compile(model, backend="toca", options={"policy": POLICY, "lowering": "eager"})
    with pytest.raises(InferenceModeError, match="no_grad"):
        call(opt)
    assert call(model).requires_grad
    assert sample(opt, 8, noise()).shape == noise().shape


def test_training_mode() -> None:
    model = randomize(PlainDiT()).train()
    opt = toca_compile.optimize(model, POLICY, lowering="eager")
    with torch.no_grad(), pytest.raises(InferenceModeError, match=r"eval\(\)"):
        call(opt)
    model.eval()
    assert sample(opt, 8, noise()).shape == noise().shape


def test_backend_with_unknown_options() -> None:
    model = randomize(PlainDiT())
    with torch.no_grad(), pytest.raises(PolicyError, match="ratio"):
        call(torch.compile(model, backend="toca", options={"policy": POLICY, "ratio": 1}))


def test_wrong_shapes_fail_as_in_the_model() -> None:
    model = randomize(PlainDiT())
    opt = toca_compile.optimize(model, POLICY, lowering="eager")
    sample(opt, 2, noise())
    with torch.no_grad(), pytest.raises((RuntimeError, torch._dynamo.exc.TorchDynamoException)):
        opt(torch.randn(2, 7, 8, 8), torch.zeros(2), torch.arange(2))
    assert sample(opt, 8, noise()).shape == noise().shape


@torch.library.custom_op("toca_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """An op that no rule knows."""
    return x.flip(1) * 2


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mysterious(PlainDiT):
    """Its second block has an unknown op in the MLP branch."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.blocks[1] = MysteriousBlock(16, 2)


class MysteriousBlock(PlainBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(mystery(self.norm2(x) * (1 + scale2) + shift2))


def test_an_op_without_a_rule_makes_its_site_reuse_only() -> None:
    model = randomize(Mysterious())
    opt = toca_compile.optimize(model, POLICY, lowering="eager")
    torch.testing.assert_close(*both_ways(opt, lambda opt: sample(opt, 8, noise())))
    sites = toca_compile.explain(opt).sites
    assert ["partial" in s.actions for s in sites] == [False, True, False, False, False, True]
    assert "toca_tests.mystery" in str(sites[3].reason)
    assert "test_errors.py:" in str(sites[3].reason)
    assert torch.equal(
        sample(toca_compile.optimize(model, FullCompute(), lowering="eager"), 3, noise()), sample(model, 3, noise())
    )


@torch.library.custom_op("toca_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """Of another library."""
    return 2 * x


doubled.register_fake(torch.empty_like)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return doubled(super().forward(x))


def test_an_op_without_a_rule_is_named_at_every_site_that_it_stops() -> None:
    model = randomize(PlainDiT())
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Doubled
    opt = toca_compile.optimize(model, POLICY, lowering="eager")
    with torch.no_grad():
        call(opt)
    sites = toca_compile.explain(opt).sites
    assert sites
    assert all("toca_tests.doubled.default has no rule (test_errors.py:" in str(site.reason) for site in sites)


@torch.library.custom_op("toca_tests::attended", mutates_args=())
def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of another library."""
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


attended.register_fake(lambda q, k, v: torch.empty_like(q))


def test_an_attention_of_another_library_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of it, but the rows of layers tell the tokens, and keeping what a branch makes asks no more."""
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attended)
    model = randomize(PlainDiT())
    opt = toca_compile.optimize(model, POLICY, lowering="eager")
    torch.testing.assert_close(*both_ways(opt, lambda opt: sample(opt, 8, noise())))
    sites = toca_compile.explain(opt).sites
    assert [(s.tokens, "partial" in s.actions) for s in sites] == [(16, False), (16, True)] * 2
    assert all("toca_tests.attended.default has no rule (models.py:" in str(s.reason) for s in sites[::2])
    opt.policy = Fora(4, 4)
    with torch.no_grad():
        x, t, y = noise(), torch.full((2,), 500), torch.arange(2)
        for _ in range(4):
            assert torch.equal(opt(x, t, y), model(x, t, y))


class Fused(nn.Module):
    """An MLP that is one op of another library."""

    def forward(self, x: Tensor) -> Tensor:
        return mystery(x)


def test_a_branch_that_is_one_op_of_another_library_is_a_site() -> None:
    model = PlainDiT()
    for block in model.blocks:
        block.mlp = Fused()
    opt = toca_compile.optimize(randomize(model), FullCompute(), lowering="eager")
    x, t, y = noise(), torch.full((2,), 500), torch.arange(2)
    with torch.no_grad():
        assert torch.equal(opt(x, t, y), model(x, t, y))
        sites = toca_compile.explain(opt).sites
        assert [("queries" in s.actions, "reuse" in s.actions) for s in sites] == [(True, True), (False, True)] * 2
        for policy in (Fora(4, 4), BlockCache(4, first=0, interval=2, order=1)):
            opt.policy = policy
            for _ in range(4):
                torch.testing.assert_close(opt(x, t, y), model(x, t, y))
    assert sites[1].name == "blocks.0.mlp"


@torch.library.custom_op("toca_tests::added", mutates_args=())
def added(x: Tensor, y: Tensor) -> Tensor:
    """An addition of another library."""
    return x + y


added.register_fake(lambda x, y: torch.empty_like(x))


class Adding(PlainBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = added(x, gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)[0])
        return added(x, gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2))


def test_an_op_without_a_rule_is_named_where_it_hides_all_sites() -> None:
    model = PlainDiT()
    model.blocks = nn.ModuleList(Adding(16, 2) for _ in range(2))
    with torch.no_grad(), pytest.raises(NoSiteError, match=r"toca_tests\.added\.default") as error:
        call(toca_compile.optimize(randomize(model), POLICY, lowering="eager"))
    assert "right module" not in str(error.value)


def test_explain_before_a_call() -> None:
    assert "call the model once" in str(toca_compile.explain(toca_compile.optimize(PlainDiT(), POLICY)))
    with pytest.raises(TocaError, match="optimised by toca_compile"):
        toca_compile.explain(PlainDiT())


class Greedy:
    """A policy that asks attention to be partial."""

    def plan(self, sites: Any) -> Any:
        from toca_compile.ir.actions import Compute, Partial
        from toca_compile.ir.plan import Plan, StepPlan
        from toca_compile.ir.types import StepKind

        full = StepPlan(StepKind.FULL, tuple(Compute() for _ in sites))
        rest = StepPlan(StepKind.PARTIAL, tuple(Partial(tokens=4) for _ in sites))
        return Plan((full, rest))


def test_a_policy_that_the_model_cannot_honour() -> None:
    model = randomize(PlainDiT())
    opt = toca_compile.optimize(model, Greedy(), lowering="eager")
    with torch.no_grad(), pytest.raises(PolicyError, match=r"cannot be partial: .*scaled_dot_product_attention"):
        call(opt)
    loose = toca_compile.optimize(model, Greedy(), lowering="eager", strict=False)
    with torch.no_grad():
        assert torch.equal(call(loose), call(model))


def test_a_model_that_changes_its_input_is_refused() -> None:
    class InPlace(PlainDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x.mul_(0.5)
            return super().forward(x, t, y)

    opt = toca_compile.optimize(randomize(InPlace()), POLICY, lowering="eager")
    with torch.no_grad(), pytest.raises(toca_compile.UnsupportedGraphError, match="in place"):
        call(opt)


def test_dynamo_switched_off_is_said() -> None:
    class Own(PlainDiT):
        """A class that no other test knows: what was traced before is called all the same."""

    opt = toca_compile.optimize(randomize(Own()), POLICY, lowering="eager")
    with torch.no_grad(), torch._dynamo.config.patch(disable=True), pytest.raises(TocaError, match="switched off"):
        call(opt)
