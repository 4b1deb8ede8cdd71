"""The command ``toca-compile``: what each subcommand takes, prints and says of mistakes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.pair import Pair
from tests.sampling import noise, sample
from toca_compile.cli import _Help, _parser, _policies, main
from toca_compile.policies import LEVELS, PRESETS, Level, ready_made
from toca_compile.rules.registry import RULES

FAST = ["--steps", "4", "--lowering", "eager"]


def pair() -> Pair:
    torch._dynamo.reset()
    return Pair()


def pair_and_call() -> tuple[Pair, dict[str, Any]]:
    return pair(), {"prompt": ["a", "b"]}


def with_sampler() -> tuple[nn.Module, Any]:
    torch._dynamo.reset()

    def sampler(model: Any, steps: int, seed: int, count: int) -> Tensor:
        return sample(model, steps, noise(count, seed=seed))

    return randomize(PlainDiT(depth=1)), sampler


def with_inputs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch._dynamo.reset()
    return randomize(PlainDiT(depth=1)), (noise(), torch.tensor([500, 500]), torch.tensor([1, 2]))


def no_pipeline() -> int:
    return 3


def fails() -> None:
    raise RuntimeError("out of order")


def test_version_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert f"torch {torch.__version__.partition('+')[0]}" in capsys.readouterr().out
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*LEVELS, *PRESETS, *ready_made(50)):
        assert any(line.startswith(f"  {name} ") for line in lines), name
    assert max(map(len, lines)) <= 100


def test_policies_by_name() -> None:
    """What ``presets`` lists, ``--policy`` takes."""
    names = (*LEVELS, *PRESETS, *ready_made(20))
    found = _policies(names, 20)
    assert list(found) == list(names)
    assert found["fast"] == Level("fast", 20)
    assert all(policy.num_steps == 20 for policy in found.values())


@pytest.mark.parametrize("command", ["demo", "evaluate", "tune --flops 2", "plan --budget 9"])
@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(
    command: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--device", device, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"toca-compile: device '{device}' cannot be used: ")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(choices.choices)


@pytest.mark.parametrize("name", subcommands())
def test_every_flag_says_what_it_is_and_its_default(name: str) -> None:
    parser = subcommands()[name]
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, action.dest
        told = _Help("")._get_help_string(action)
        has = action.default not in (None, [], argparse.SUPPRESS) and action.default is not False
        if action.option_strings and has:
            assert "default" in told, action.dest
    assert "(default: 50)" in text or "--steps" not in text


def test_explain_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tests.test_cli_commands:with_inputs", "--steps", "6"]) == 0
    printed = capsys.readouterr()
    assert "BlockCache(num_steps=6, first=0, interval=3, order=2, basis='newton')" in printed.out
    assert "schedule  FSSFSS" in printed.out
    assert printed.err == ""
    assert main(["explain", "tests.test_cli_commands:with_inputs", "--policy", "FORA N=2", "--steps", "4"]) == 0
    assert "schedule  FRFR" in capsys.readouterr().out


class Erased(nn.Module):
    """An MLP with an op of no rule, beside an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.nn.functional.scaled_dot_product_attention(*(self.up(x)[:, None],) * 3)[:, 0]
        return x + self.down(torch.renorm(self.up(x), 2, 0, 1.0))


def without_a_rule() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch._dynamo.reset()
    return randomize(Erased()), (torch.randn(2, 16, 8),)


def test_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == f"{len(RULES)} ops have rules, in toca_compile/rules/"
    files = {line.strip() for line in listed if line.endswith(".py")}
    assert files == {
        "attention.py",
        "collectives.py",
        "indexing.py",
        "linear.py",
        "norm.py",
        "pointwise.py",
        "shape.py",
    }
    ops = [line.split()[0] for line in listed if line.startswith("    ")]
    assert sorted(ops) == sorted(map(str, RULES))
    linear = next(line for line in listed if line.startswith("    aten.linear.default "))
    assert " linear " in linear
    assert linear.endswith("mixes the features of each row, nothing else.") or linear.endswith(" …")
    assert max(map(len, listed)) <= 120


def test_rules_that_a_model_uses_and_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "tests.test_cli_commands:without_a_rule"]) == 0
    lines = capsys.readouterr().out.splitlines()
    missing = [line for line in lines if "has no rule" in line]
    (renorm,) = missing
    assert renorm.startswith("  aten.renorm.default has no rule: 1 call, first at test_cli_commands.py:")
    assert renorm.endswith("; stops site1")
    used = {line.split()[0]: line for line in lines if line.startswith("    ")}
    assert "aten.renorm.default" not in used
    assert used["aten.linear.default"].endswith(" 3 calls")
    assert lines[0].startswith("1 graph, ")
    assert lines[0].endswith(" follow a rule, 1 do not")


def test_rules_of_a_model_that_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "tests.test_cli_commands:with_inputs"]) == 0
    printed = capsys.readouterr().out
    assert "follow a rule, 0 do not" in printed
    assert "without a rule" not in printed


def test_rules_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "toca_compile.rules", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: toca-compile rules" in done.stdout


@pytest.mark.parametrize("factory", ["pair", "pair_and_call", "with_sampler"])
def test_what_a_factory_returns_is_evaluated(factory: str, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    numbers = ["--samples", "2", "--batch", "2", "--seeds", "0", "--fewer", "2", "--out", str(tmp_path / "out")]
    asked = ["evaluate", "--model", f"tests.test_cli_commands:{factory}", "--policy", "FORA N=2", *FAST, *numbers]
    assert main(asked) == 0
    rows = {line.split("|")[1].strip(): line for line in (tmp_path / "out" / "table.md").read_text().splitlines()}
    assert {"uncached", "2 steps", "FORA N=2"} <= set(rows)
    assert float(rows["FORA N=2"].split("|")[2]) > 1.5


def test_both_transformers_of_a_pipeline_are_cached() -> None:
    from toca_compile.demo.sampling import load_sampling

    sampling = load_sampling("tests.test_cli_commands:pair")
    opt = toca_compile.optimize(sampling.model, toca_compile.Fora(4, 2), lowering="eager")
    plain, cached = (sampling.sampler(model, 4, 0, 2) for model in (sampling.model, opt))
    assert plain.shape == cached.shape == (2, 2, 8, 8)
    assert not torch.equal(plain, cached)
    assert torch.equal(sampling.sampler(sampling.model, 4, 0, 2), plain)


def test_a_policy_is_searched_for_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    asked = ["tune", "--flops", "1.5", "--model", "tests.test_cli_commands:with_sampler", "--samples", "2"]
    assert main([*asked, *FAST, "--trials", "3", "--out", str(tmp_path)]) == 0
    assert toca_compile.load_policy(tmp_path / "policy.json")
    assert capsys.readouterr().out.endswith("policy.json\n")


def test_a_plan_is_searched_for_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    asked = ["plan", "--budget", "2", "--model", "tests.test_cli_commands:with_sampler", "--samples", "2"]
    assert main([*asked, *FAST, "--trials", "8", "--out", str(tmp_path)]) == 0
    found = toca_compile.load_policy(tmp_path / "policy.json")
    assert len(found.full_steps()) == 2  # type: ignore[attr-defined]
    assert capsys.readouterr().out.endswith("policy.json\n")
    assert main([*asked, *FAST, "--budget", "4", "--out", str(tmp_path)]) == 2
    assert "budget must lie between 1 and the number of steps, 4, not be 4" in capsys.readouterr().err


def test_the_demo_takes_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    asked = ["demo", "--model", "tests.test_cli_commands:with_sampler", "--samples", "2", "--repeats", "1"]
    assert main([*asked, *FAST, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "one forecast for all blocks" in printed.out.replace("\n", " ") or "one forecast" in printed.out
    lines = printed.err.splitlines()
    assert lines[0] == "toca_compile: loading tests.test_cli_commands:with_sampler"
    assert "toca_compile: compile: uncached" in lines
    assert any(line.startswith("toca_compile: compiling variant 1 of ") for line in lines)


def test_metrics_whose_packages_are_not_there_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    torch._dynamo.reset()
    numbers = ["--samples", "2", "--batch", "2", "--seeds", "0", "--fewer", "2", "--out", str(tmp_path)]
    assert main(["evaluate", "--policy", "FORA N=2", *FAST, *numbers]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if "no feature distance and no KID" in line)
    assert "pip install --no-deps efficientnet-lite-pytorch" in told
    table = (tmp_path / "table.md").read_text()
    assert "FORA N=2" in table


@pytest.mark.parametrize(
    "command", [["demo"], ["evaluate", "--no-features"], ["tune", "--flops", "2"], ["plan", "--budget", "2"]]
)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no folder, no hub id (owner/name) and no package.module:factory"),
        ("tests.test_cli_commands:nobody", "nobody"),
        ("tests.test_cli_commands:no_pipeline", "must return a pipeline"),
        ("tests.test_cli_commands:fails", "failed: RuntimeError: out of order"),
        ("tests", "neither model_index.json nor a config.json"),
    ],
)
def test_a_wrong_name_is_one_line(command: list[str], name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert main([*command, "--model", name]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("toca_compile: loading")]
    assert len(errors) == 1
    assert errors[0].startswith("toca-compile: ")
    assert says in errors[0]


@pytest.mark.parametrize(
    "asked",
    [
        ["explain", "nowhere"],
        ["explain", "tests.test_cli_commands:with_inputs", "--policy", "nothing"],
        ["explain", "tests.test_cli_commands:with_inputs", "--policy", "nowhere.json"],
        ["evaluate", "--policy", "nothing"],
        ["tune", "--flops", "-1"],
    ],
)
def test_other_wrong_words_are_one_line_too(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main(asked) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_the_traceback_is_shown_on_demand(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "variable":
        monkeypatch.setenv("TOCA_TRACEBACK", "1")
    with pytest.raises(toca_compile.TocaError, match="neither a folder"):
        main(["explain", "nowhere", *(["--traceback"] if way == "flag" else [])])


def test_a_transformer_alone_is_not_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert main(["tune", "--flops", "2", "--model", str(tmp_path)]) == 2
    assert "FluxTransformer2DModel alone, and how to sample it is not known" in capsys.readouterr().err
