"""Every example runs: small, eager, in this process, as a user calls it."""

import re
import runpy
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.emoji import checksum, emoji_archive
from toca_compile.demo import emoji_flux, noto_emoji

pytest.importorskip("diffusers")

Run = Callable[..., str]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTED = {
    "quickstart", "own_policy", "inspect_a_model", "dit_xl2", "pixart", "flux", "opensora", "train_fashion_dit",
    "train_fashion_classifier", "train_emoji_flux", "serve",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(name: str, *arguments: object) -> str:
        """What an example prints."""
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")  # of the terminal that tables are printed for
        monkeypatch.syspath_prepend(EXAMPLES)  # as for a script, whose folder comes first
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def write_pictures(folder: Path, count: int) -> Path:
    """Fashion-MNIST's files with pictures of our own: a bright square whose place tells the class."""
    for kind in ("train", "t10k"):
        pictures = bytearray()
        for i in range(count):
            row, column = divmod(i % 10, 5)
            bright = range(5 * column, 5 * column + 5)
            for y in range(28):
                pictures += bytes(255 if y // 14 == row and x in bright else 0 for x in range(28))
        (folder / f"{kind}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, count, 28, 28) + pictures)
        labels = bytes(i % 10 for i in range(count))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels)
    return folder


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_quickstart(run: Run) -> None:
    printed = run("quickstart")
    assert re.search(r"^schedule +FSSFSS", printed, re.M)
    assert float(re.findall(r"pictures: ([\d.]+) dB", printed)[0]) > 20


def test_own_policy(run: Run) -> None:
    printed = run("own_policy")
    composed, taking_turns = printed.split("TakingTurns: ")
    assert "steps FPPFPPFP" in composed
    assert "transformer_blocks.3.ff.net  tokens computed: [16, 4, 4, 16, 4, 4, 16, 4]" in composed
    assert "transformer_blocks.1.attn1   tokens computed: [16, 16, 0, 16, 0, 16, 0, 16]" in taking_turns
    assert "transformer_blocks.2.attn1   tokens computed: [16, 0, 16, 0, 16, 0, 16, 0]" in taking_turns
    assert all(0 < float(error) < 10 for error in re.findall(r"error ([\d.]+)%", printed))


def test_inspect_a_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("inspect_a_model")
    assert "transformer_blocks.1.ff.net: some tokens alone" in printed
    assert re.search(r"blocks\.1\.attn1: all tokens or none: .*mixes the tokens", printed)
    assert "\n  find-sites\n" in printed
    graph = run("inspect_a_model", "inspect_a_model:small_dit", "--graph", "find-sites")
    assert "linear" in graph.split("\nfind-sites\n")[1]
    with pytest.raises(SystemExit, match="no stage 'nothing'; there are capture, "):
        run("inspect_a_model", "--graph", "nothing")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("dit_xl2", ["ToCa ddim-50", "FORA N=3"]),
        ("pixart", ["ToCa dpm-20", "ToCa dpm-20-n2"]),
        ("flux", ["ToCa 50-n4"]),
        ("opensora", ["ToCa rflow-30"]),
    ],
)
def test_systems(run: Run, tmp_path: Path, name: str, rows: list[str]) -> None:
    printed = run(name, "--lowering", "eager", "--steps", 4, "--repeats", 1, "--out", tmp_path)
    for row in rows:
        speedup = re.search(rf"^ *{re.escape(row)} .*? (\d+\.\d\d) ", printed, re.M)
        assert speedup is not None, printed
        assert float(speedup[1]) > 1
    written = {row.replace(" ", "-") for row in ["uncached", *rows]}
    assert {path.stem for path in tmp_path.glob("*.png")} == written


def test_training_the_model(run: Run, tmp_path: Path) -> None:
    data, out = write_pictures(tmp_path, 8), tmp_path / "out"
    printed = run("train_fashion_dit", "--data", data, "--out", out, "--epochs", 1, "--batch", 4, "--device", "cpu")
    before, after = (float(loss) for loss in re.findall(r"held-out(?: loss)? ([\d.]+)", printed))
    assert "step 2/2" in printed
    assert after != before
    assert (out / "config.json").exists()
    assert (out / "scheduler" / "scheduler_config.json").exists()


def test_training_the_classifier(run: Run, tmp_path: Path) -> None:
    data, out = write_pictures(tmp_path, 160), tmp_path / "out"
    printed = run("train_fashion_classifier", "--data", data, "--out", out, "--epochs", 4, "--batch", 16)
    assert float(re.findall(r"accuracy ([\d.]+)", printed)[-1]) == 1
    assert (out / "model.safetensors").exists()


def test_training_the_second_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = emoji_archive(tmp_path / noto_emoji.URL.rpartition("/")[2], 40)
    monkeypatch.setattr(noto_emoji, "SHA512", checksum(archive))
    given = "--data", tmp_path, "--out", tmp_path / "out", "--device", "cpu", "--dtype", "float32", "--sheet-steps", 2
    printed = run("train_emoji_flux", *given, "--stages", "16:2:4")
    assert "38 emoji, 44 words, " in printed
    assert "step 2/2  side 16" in printed
    printed = run("train_emoji_flux", *given, "--stages", "16:2:4", "32:1:4")  # goes on
    (row,) = re.findall(r"^step .*", printed, re.M)
    assert row.startswith("step 3/3  side 32")
    text = emoji_flux.load(tmp_path / "out")[-1]
    assert text.indices(["face no 39, no 10"])[0].count_nonzero() == 4  # the 10th is held out
    assert (tmp_path / "out" / "samples.png").exists()
