"""Pipelines whose transformer has the quantised weights of a library: equal to the same pipeline without us, in one
graph, and their layers can be computed for some tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import toca_compile
from tests.models import randomize
from tests.pipelines import run
from tests.pipelines.builders import flux_pipe, kinds, words
from toca_compile import FullCompute, ToCa

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("torchao.quantization")
        library.quantize_(model, getattr(library, config)())

    return quantise


def gguf(kind: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("gguf")
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        stored = library.GGMLQuantizationType[kind]
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and layer.in_features % library.GGML_QUANT_SIZES[stored][0] == 0:
                    data = torch.from_numpy(library.quantize(layer.weight.detach().numpy(), stored))
                    new = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.float32)
                    new.weight, new.bias = GGUFParameter(data, quant_type=stored), layer.bias
                    setattr(parent, name, new)

    return quantise


KINDS = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao int8, dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "GGUF Q8_0": gguf("Q8_0"),
    "GGUF Q4_0": gguf("Q4_0"),
}


@pytest.mark.filterwarnings("default")  # of the libraries as they are imported
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights(kind: str) -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    KINDS[kind](randomize(model))
    pipe, call = flux_pipe("FluxPipeline", model)
    pipe.set_progress_bar_config(disable=True)
    call["prompt_embeds"] = words(1, 5, 32)
    plain = run(pipe, call, 4)
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    assert torch.equal(run(pipe, call, 4), plain)
    pipe.transformer.policy = ToCa(50, interval=3, fresh_ratio=0.4, schedule="constant")
    first = run(pipe, call, 4)
    assert kinds(pipe) == [["fppf"]]
    assert not torch.equal(first, plain)
    assert torch.equal(run(pipe, call, 4), first)
    assert toca_compile.summary(pipe).graphs == 1
    assert "no rule" not in str(toca_compile.explain(pipe))
    toca_compile.restore(pipe)
    assert torch.equal(run(pipe, call, 4), plain)
