"""The command ``toca-compile passes``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise
from toca_compile.cli import main
from toca_compile.compiler.pipeline import PIPELINE

NAMES = [p.name for p in PIPELINE]


def tiny() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch._dynamo.reset()
    return randomize(PlainDiT(depth=2)), (noise(), torch.tensor([500, 500]), torch.tensor([1, 2]))


def by_name() -> tuple[nn.Module, dict[str, Tensor]]:
    model, (x, t, y) = tiny()
    return model, {"x": x, "t": t, "y": y}


def no_inputs() -> nn.Module:
    return tiny()[0]


def no_model() -> int:
    return 3


def fails() -> None:
    raise RuntimeError("out of order")


def test_the_command_prints_passes_and_variants(capsys: pytest.CaptureFixture[str], graphs: dict[str, str]) -> None:
    assert main(["passes", "tests.test_cli:tiny"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}\n\n// {name}: " in printed for name in NAMES)
    assert "template1[reuse; partial]\n\n// template 1: blocks.0 reuse" in printed
    assert main(["passes", "tests.test_cli:by_name", "--pass", "find-sites"]) == 0
    assert capsys.readouterr().out == graphs["find-sites"] + "\n"


def test_the_command_prints_the_variants_of_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toca_compile.save_policy(toca_compile.Fora(2, 2), tmp_path / "fora.json")
    assert main(["passes", "tests.test_cli:tiny", "--policy", str(tmp_path / "fora.json")]) == 0
    printed = capsys.readouterr().out
    assert "template1[reuse; reuse]" in printed
    assert "template1[reuse; partial]" not in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "neither a folder"),
        (["nowhere.at_all:model"], "cannot be imported"),
        (["tests.test_cli:nobody"], "nobody"),
        (["tests.test_cli:no_model"], "must return a torch.nn.Module"),
        (["tests.test_cli:fails"], "failed: RuntimeError: out of order"),
        (["tests.test_cli:no_inputs"], "write a factory that returns the model with its inputs"),
        (["tests"], "no config.json"),
        (["tests.test_cli:tiny", "--pass", "find-nothing"], "no pass or variant 'find-nothing'; there are capture,"),
        (["tests.test_cli:tiny", "--policy", "nothing"], "no policy 'nothing'"),
    ],
)
def test_a_wrong_word_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


FOLDERS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "sample_size": 8, "norm_num_groups": 1},
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": 12, "cross_attention_dim": 16,
        "sample_size": 8, "norm_num_groups": 1, "use_additional_conditions": False,
    },
    "FluxTransformer2DModel": {
        "in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
        "pooled_projection_dim": 12, "axes_dims_rope": [2, 2, 4],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_needs_no_weights(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": kind, **FOLDERS[kind]}))
    assert main(["passes", str(tmp_path), "--pass", "find-sites"]) == 0
    printed = capsys.readouterr().out
    assert "transformer_blocks.0.ff.net  mlp on " in printed
    assert "transformer_blocks.2" not in printed
