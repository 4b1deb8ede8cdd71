"""Quantised weights: tensors around plain ones pass through capture, and the plain ones are what is computed with."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import POLICY, TIMES, kinds, optimized, same_as_dense, steps
from tests.sampling import noise
from toca_compile import Fora, FullCompute, TaylorSeer
from toca_compile.compiler.wrappers import Wrapper

aten = torch.ops.aten


class Int8(Tensor):
    """An int8 weight and a scale for each row, as libraries write them: it is what it was quantised from, as far as
    ``linear`` and whoever asks for its values go."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> "Int8":
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)  # type: ignore

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data_, self.scale_ = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_", "scale_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> "Int8":
        return cls(inner["data_"], inner["scale_"])

    @classmethod
    def of(cls, weight: Tensor) -> "Int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def plain(self) -> Tensor:
        return self.data_.to(self.scale_.dtype) * self.scale_

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].data_, args[0].scale_)
        values = [a.plain() if isinstance(a, Int8) else a for a in args]
        return func(*values, **(kwargs or {}))


class Nested(Int8):
    """The same around a wrapper: its scales are quantised, too."""

    @classmethod
    def of(cls, weight: Tensor) -> "Nested":
        single = Int8.of(weight)
        return cls(single.data_, Int8.of(single.scale_))

    def plain(self) -> Tensor:
        scale: Any = self.scale_
        return self.data_.to(scale.dtype) * scale.plain()


def quantised(model: nn.Module, kind: type[Int8] = Int8) -> nn.Module:
    """The model with quantised linear layers."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", [Int8, Nested])
def test_a_quantised_model_is_cached_as_any_other(kind: type[Int8]) -> None:
    model = quantised(randomize(PlainDiT()), kind)
    inputs = [(noise() + 0.1 * i, torch.full((2,), t), torch.arange(2)) for i, t in enumerate(TIMES[:5])]
    opt = same_as_dense(model, [Fora(8, 4), POLICY, TaylorSeer(8, 2, 1)], inputs, lambda opt: None)
    opt.policy = POLICY
    steps(opt, noise(), TIMES)
    assert kinds(opt) == "fpppfppp"
    report = str(toca_compile.explain(opt))
    assert "partial" in report
    assert "no rule" not in report


def test_the_graph_has_the_plain_tensors() -> None:
    opt = optimized(quantised(randomize(PlainDiT(depth=1))), FullCompute())
    steps(opt, noise(), TIMES[:1])
    captured = toca_compile.explain(opt).graphs()["capture"]
    assert ": i8[32, 16]" in captured
    assert ": f32[32, 1]" in captured


def test_weights_that_change_are_seen() -> None:
    """Another quantised weight in the place of one, and the inner tensors written to."""
    model = quantised(randomize(PlainDiT()))
    opt = optimized(model, Fora(8, 4))
    steps(opt, noise(), TIMES[:1])
    head: Any = model.head
    head.weight = nn.Parameter(Int8.of(torch.randn(head.weight.shape)), requires_grad=False)
    opt.reset()
    assert torch.equal(steps(opt, noise(), TIMES[:1]), steps(model, noise(), TIMES[:1]))
    head.weight.scale_.mul_(2)
    opt.reset()
    assert torch.equal(steps(opt, noise(), TIMES[:1]), steps(model, noise(), TIMES[:1]))
    # As ``module.to`` does with weights of wrappers: torch refuses it for a tensor that is referred to weakly.
    torch.utils.swap_tensors(head.weight, nn.Parameter(Int8.of(torch.randn(head.weight.shape)), requires_grad=False))
    opt.reset()
    assert torch.equal(steps(opt, noise(), TIMES[:1]), steps(model, noise(), TIMES[:1]))


def test_a_wrapper_comes_apart_and_together() -> None:
    weight = Nested.of(torch.randn(4, 6))
    wrapper = Wrapper.of(weight)
    assert wrapper is not None
    assert wrapper.names() == ["data_", "scale_.data_", "scale_.scale_"]
    again = wrapper.rebuilt(*wrapper.flat(weight))
    assert type(again) is Nested
    assert torch.equal(again.plain(), weight.plain())
    assert Wrapper.of(torch.randn(2)) is None
    assert Wrapper.of(3) is None


def test_backend_toca_takes_them_too() -> None:
    model = quantised(randomize(PlainDiT()))
    compiled = torch.compile(model, backend="toca", options={"policy": Fora(8, 4), "lowering": "eager"})
    with torch.no_grad():
        for i, t in enumerate(TIMES[:3]):
            out = compiled(noise() + 0.1 * i, torch.full((2,), t), torch.arange(2))
            if not i:
                assert torch.equal(out, model(noise(), torch.full((2,), t), torch.arange(2)))
    assert [r.kind.value[0] for r in toca_compile.controls(compiled).steps] == ["f", "r", "r"]


class Tagged(nn.Parameter):
    """Bytes with a tag that every result of an op on them has, too, as diffusers' ``GGUFParameter``."""

    tag: str

    def __new__(cls, data: Tensor, tag: str = "") -> "Tagged":
        self = torch.Tensor._make_subclass(cls, data, False)
        self.tag = tag
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return cls(result, args[0].tag) if isinstance(result, Tensor) and args else result

    def as_tensor(self) -> Tensor:
        return torch.Tensor._make_subclass(torch.Tensor, self, False)


class Stored(nn.Module):
    """A linear layer whose weight is stored as bytes: a half-precision scale, then 8-bit integers, row by row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True).half() / 100
        integers = (layer.weight.detach() / scale).round().clamp(-127, 127).to(torch.int8)
        self.weight = Tagged(torch.cat([scale.view(torch.uint8), integers.view(torch.uint8)], 1), "q8")
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.tag == "q8"
        scale, integers = torch.split(self.weight.as_tensor(), [2, self.weight.shape[1] - 2], 1)
        weight = scale.view(torch.float16).float() * integers.view(torch.int8)
        return nn.functional.linear(x, weight, self.bias)


def test_weights_of_a_subclass_that_is_no_wrapper() -> None:
    model = randomize(PlainDiT())
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Stored(layer))
    inputs = [(noise() + 0.1 * i, torch.full((2,), t), torch.arange(2)) for i, t in enumerate(TIMES[:5])]
    opt = same_as_dense(model, [Fora(8, 4), POLICY], inputs, lambda opt: None)
    with torch.no_grad():
        assert type(opt(*inputs[0])) is Tensor
    assert "no rule" not in str(toca_compile.explain(opt))
