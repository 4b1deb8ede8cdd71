"""What the compiler says of its work: the texts after each pass, in the log, in torch's trace and on the command line."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import ToCa
from toca_compile.cli import main
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.ir.program import Program

NAMES = [p.name for p in PIPELINE]


def texts() -> dict[str, str]:
    torch._dynamo.reset()
    policy = ToCa(num_steps=3, fresh_ratio=0.3, schedule="constant")
    opt = toca_compile.optimize(randomize(PlainDiT(depth=2)), policy, lowering="eager")
    sample(opt, 3, noise())
    return toca_compile.explain(opt).graphs()


@pytest.fixture(scope="module")
def graphs() -> dict[str, str]:
    return texts()


def test_each_pass_shows_what_it_found(graphs: dict[str, str]) -> None:
    shown = {
        "capture": ["3 inputs, 32 parameters", "linear_3 = linear(add_3, arg13_1, arg14_1)", "f32[2, 16, 48]"],
        "infer-axes": ["[b, (d2 d3), d1]", "d5 = d4 + d4 = 16", "d9 d14 = 3", "every call has a rule"],
        "find-attention": ["scaled_dot_product_attention: queries (n n1) read keys (n n1), for each (b heads)"],
        "find-sites": [
            "1  blocks.0.mlp  mlp on image (h w), 4×4\n     add_4 -> linear_6 -> add_7",
            "may compute, forecast, partial, reuse, skip",
            "not partial: aten.scaled_dot_product_attention.default mixes the tokens",
            "[b, (h w), c]  // blocks.0.mlp, its output",
        ],
        "outline": ["template 1 ×2: 36 calls, blocks.0, blocks.0.mlp", "segment 2 = template 1("],
        "find-scores": ["blocks.1.mlp: as keys of blocks.1"],
        "find-clock": ["// find-clock: told by arg4_1", "arg4_1: i64[2] [b]"],
        "hoist": ["// hoist: nothing to do once a run"],
    }  # fmt: skip
    for i, name in enumerate(NAMES):
        for words in shown[name]:
            assert words in graphs[name]
            assert i == 0 or words not in graphs[NAMES[i - 1]]


def test_every_value_of_a_variant_has_a_type(graphs: dict[str, str]) -> None:
    text = graphs["template1[reuse; partial]"]
    assert text.startswith("// template 1: blocks.0 reuse; blocks.0.mlp partial\n")
    lines = [line for line in text.splitlines() if " = " in line and not line.startswith("//")]
    assert all(re.search(r" : (int|(\d+ × )?[a-z]+\d+\[[\d, ]*\] \[.*\])", line) for line in lines), text
    assert re.search(r"cache1 = buffer cache of blocks\.0\.mlp +: f32\[2, 16, 16\] \[b, \(h w\), c\]", text)
    assert re.search(r"k1 = number k of blocks\.0\.mlp +: int$", text, re.M)
    assert re.search(r"gather_tokens_default = .*\[b, K, c\]", text)


def test_texts_are_the_same_in_two_runs(graphs: dict[str, str]) -> None:
    assert texts() == graphs


def test_what_is_hoisted_is_shown(tmp_path: Path) -> None:
    manager = PassManager(PIPELINE, dump_dir=tmp_path)

    def backend(gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        manager.run(Program(gm, tuple(isinstance(a, nn.Parameter) for a in args), tuple(args)))
        return gm.forward

    with torch.no_grad():
        torch.compile(Reading().eval(), backend=backend)(torch.randn(2, 12, 8), torch.randn(2, 5, 6), torch.ones(2))
    assert "// hoist: 1 segment of 5 calls once a run" in manager.graphs["hoist"]
    assert "constant during a run" in manager.graphs["hoist"]
    assert "constant during a run" not in manager.graphs["find-clock"]
    files = {f"{i:02}.{name}.txt": text for i, (name, text) in enumerate(manager.graphs.items())}
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == files


class Reading(nn.Module):
    """Tokens that read a text, whose keys and values are the same at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.mlp = nn.Linear(8, 8), nn.Linear(6, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x = x + t.sin()[:, None, None]
        k, v = self.kv(text)[:, None].chunk(2, -1)
        x = x + nn.functional.scaled_dot_product_attention(self.q(x)[:, None], k, v)[:, 0]
        return x + self.mlp(x).relu()


def test_the_log_has_a_line_at_info_and_the_text_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    for level in (logging.INFO, logging.DEBUG):
        caplog.clear()
        with caplog.at_level(level, logger="toca_compile"):
            graphs = texts()
        said = [r.getMessage() for r in caplog.records if r.name == "toca_compile.compiler.trace"]
        assert any(
            re.fullmatch(r"03\.find-sites: \d+ ms, 4 residual branches: 2 mlp, 2 self_attention", s) for s in said
        )
        for name in ("find-sites", "template1[reuse; partial]"):
            assert any(s.endswith(graphs[name]) for s in said) is (level == logging.DEBUG)


def test_torch_logs_and_tlparse_show_the_texts(tmp_path: Path) -> None:
    """By the environment variables, in a process of its own."""
    code = "from tests.test_cli import texts; print(texts()['find-sites'])"
    asked = {"TORCH_LOGS": "+toca_compile", "TORCH_TRACE": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert "03.find-sites: " in done.stderr
    assert "may compute, forecast, partial, reuse, skip" in done.stderr
    (path,) = tmp_path.iterdir()
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(re.sub(r"^\S+ \S+ \S+ \S+ ", "", line)) for line in lines if not line.startswith("\t")]
    artifacts = [r["artifact"]["name"] for r in records if "artifact" in r]
    ours = [a for a in artifacts if a.startswith("toca_compile.")]
    assert ours[: len(NAMES)] == [f"toca_compile.{i:02}.{name}" for i, name in enumerate(NAMES)]
    assert "toca_compile.template1[reuse; partial]" in ours
    assert f"\t{done.stdout.splitlines()[0]}" in lines


# -- the command ------------------------------------------------------------------------------------------------------


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
        (["tests.test_cli:tiny", "--policy", "nothing"], "no preset 'nothing'"),
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
