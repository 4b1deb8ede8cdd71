"""LoRA on an optimised pipeline does what it does on a plain one: bit by bit with ``FullCompute``, and with caches too."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.pipelines import build, flux, run
from toca_compile import Fora, FullCompute

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

NAMES = ("to_q", "to_k", "ff.net.2")
Act = Callable[[Any], Any]


def pipelines(policy: Any) -> tuple[Any, Any, dict[str, Any]]:
    """An optimised pipeline, its plain twin, and the arguments of a call."""
    plain, call = build("FluxPipeline")
    plain.transformer = flux(double=1, single=1)
    pipe = copy.deepcopy(plain)
    toca_compile.optimize(pipe, policy, lowering="eager")
    return pipe, plain, call


class Lora(nn.Module):
    """A linear layer with a difference of low rank; it may be merged into the weight."""

    def __init__(self, linear: nn.Linear, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear, self.scale, self.merged = linear, 1.0, False
        self.down = nn.Parameter(torch.randn(2, linear.in_features, generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(linear.out_features, 2, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out if self.merged else out + x @ self.down.T @ self.up.T * self.scale

    def merge(self, sign: int = 1) -> None:
        self.linear.weight.data += sign * self.scale * self.up.data @ self.down.data
        self.merged = sign > 0


def inject(model: nn.Module) -> None:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(NAMES)]
    for i, (name, linear) in enumerate(found):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, Lora(linear, i))


def each(act: Callable[[Lora], Any]) -> Act:
    def acts(pipe: Any) -> None:
        for module in [m for m in pipe.transformer.modules() if isinstance(m, Lora)]:
            act(module)

    return acts


def remove(model: nn.Module) -> None:
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, Lora)]:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, module.linear)


BY_HAND: list[tuple[str, Act]] = [
    ("inject", lambda p: inject(p.transformer)),
    ("scale", each(lambda m: setattr(m, "scale", 0.5))),
    ("fuse", each(lambda m: m.merge())),
    ("unfuse", each(lambda m: m.merge(-1))),
    ("remove", lambda p: remove(p.transformer)),
]


def test_layers_put_in_by_hand() -> None:
    pipe, plain, call = pipelines(FullCompute())
    before, last = run(pipe, call, 2), None
    for name, act in BY_HAND:
        act(pipe)
        act(plain)
        result = run(pipe, call, 2)
        assert torch.equal(result, run(plain, call, 2)), name
        assert (name == "remove") == torch.allclose(result, before, atol=1e-5), name
        assert last is None or name == "fuse" or not torch.equal(result, last), name
        assert list(pipe.transformer.state_dict()) == list(plain.transformer.state_dict())
        last = result


def test_layers_put_in_by_hand_with_caches() -> None:
    """Also into weights that are written in place between two calls: nothing of the call before is read."""
    pipe, plain, call = pipelines(Fora(50, 2))
    before = run(pipe, call, 3)
    inject(pipe.transformer)
    inject(plain.transformer)
    after = run(pipe, call, 3)
    assert [r.kind.value for r in pipe.transformer.steps] == ["full", "reuse", "full"]
    assert not torch.equal(after, before)
    each(lambda m: m.merge())(pipe)
    torch.testing.assert_close(run(pipe, call, 3), after, rtol=1e-3, atol=1e-3)
    # One that was optimised with the layers in it.
    toca_compile.optimize(plain, Fora(50, 2), lowering="eager")
    assert torch.equal(run(plain, call, 3), after)


def adapter(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A LoRA of rank 2 as it is published."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and name.endswith(NAMES):
            found[f"transformer.{name}.lora_A.weight"] = torch.randn(2, m.in_features, generator=generator) * 0.3
            found[f"transformer.{name}.lora_B.weight"] = torch.randn(m.out_features, 2, generator=generator) * 0.3
    return found


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # peft's, of the second adapter
def test_adapters_of_peft() -> None:
    pytest.importorskip("peft")
    pipe, plain, call = pipelines(FullCompute())
    first, second = (adapter(plain.transformer, seed) for seed in range(2))
    before = last = run(pipe, call, 2)
    acts: list[tuple[str, Act]] = [
        ("load", lambda p: p.load_lora_weights(dict(first), adapter_name="a")),
        ("scale", lambda p: p.set_adapters("a", 0.5)),
        ("fuse", lambda p: p.fuse_lora(lora_scale=0.7)),
        ("unfuse", lambda p: p.unfuse_lora()),
        ("disable", lambda p: p.disable_lora()),
        ("enable", lambda p: p.enable_lora()),
        ("load b", lambda p: p.load_lora_weights(dict(second), adapter_name="b")),
        ("both", lambda p: p.set_adapters(["a", "b"], [0.5, 0.3])),
        ("delete", lambda p: p.delete_adapters("a")),
        ("unload", lambda p: p.unload_lora_weights()),
    ]
    for name, act in acts:
        act(pipe)
        act(plain)
        result = run(pipe, call, 2)
        assert torch.equal(result, run(plain, call, 2)), name
        assert (name in ("disable", "unload")) == torch.allclose(result, before, atol=1e-5), name
        assert not torch.equal(result, last), name
        last = result
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_adapters_of_peft_with_caches() -> None:
    """Loaded before and after the pipeline is optimised, and scaled in the call."""
    pytest.importorskip("peft")
    pipe, plain, call = pipelines(Fora(50, 2))
    weights = adapter(plain.transformer, 0)
    before = run(pipe, call, 3)
    for p in (pipe, plain):
        p.load_lora_weights(dict(weights), adapter_name="a")
    toca_compile.optimize(plain, Fora(50, 2), lowering="eager")
    after = run(pipe, call, 3)
    assert not torch.equal(after, before)
    assert torch.equal(run(plain, call, 3), after)
    half = run(pipe, call, 3, joint_attention_kwargs={"scale": 0.5})
    assert [r.kind.value for r in pipe.transformer.steps] == ["full", "reuse", "full"]
    assert not torch.equal(half, after)
    assert torch.equal(run(pipe, call, 3), after)
    toca_compile.restore(pipe)
    pipe.unload_lora_weights()
    toca_compile.optimize(pipe, Fora(50, 2), lowering="eager")
    assert torch.equal(run(pipe, call, 3), before)
