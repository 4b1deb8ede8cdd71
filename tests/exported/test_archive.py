"""The file itself: compiled by AOTInductor once, run in a process that has neither Dynamo nor the model, and refused where
it is not what was written."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, diffusers_dit, randomize
from tests.runs import optimized
from tests.sampling import noise, sample
from toca_compile import BlockCache, Composition, ExportError, LoadedModel, ToCa
from toca_compile.demo import fashion_dit
from toca_compile.policies import Anchors, Every, Hermite, Rule

pytestmark = [pytest.mark.inductor, pytest.mark.xdist_group("export")]

STEPS = 50
POLICY = ToCa(STEPS, interval=4, fresh_ratio=0.3)  # whose K is another one at each step
PICTURE = noise(4, channels=1)

SAMPLING = """
import sys, torch, toca_compile
model = toca_compile.load(sys.argv[1])
x, made = torch.load(sys.argv[2])["x"], []
for run in range(2):
    z = x
    for i in range(50):
        z = z - model(z, torch.full((4,), (49 - i) * 1000 // 50), torch.arange(4)).sample / 50
    made.append(z)
    kinds = "".join(r.kind.value[0] for r in model.steps)
    model.reset()
unwanted = [m for m in sys.modules if m.split(".")[0] in ("diffusers", "tests") or m.startswith("torch._dynamo")]
torch.save({"made": made, "kinds": kinds, "unwanted": unwanted}, sys.argv[3])
"""


@dataclass(frozen=True)
class Exported:
    path: Path
    live: Tensor
    kinds: str


def dit(seed: int = 0) -> nn.Module:
    """Called as the model of ``examples/fashion_dit`` is."""
    return randomize(diffusers_dit(depth=2, in_channels=1, out_channels=1), seed)


def sampled(model: Any) -> Tensor:
    """Pictures of 50 steps."""
    return sample(lambda x, t, y: model(x, t, y).sample, STEPS, PICTURE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch._dynamo.reset()
    model = dit()
    live = optimized(model, POLICY)
    made = sampled(live)
    path = tmp_path_factory.mktemp("exported") / "dit.pt2"
    inputs = PICTURE, torch.zeros(4, dtype=torch.int64), torch.arange(4)
    toca_compile.export(model, POLICY, inputs, path, hoist=False)
    assert [file.name for file in path.parent.iterdir()] == ["dit.pt2"]
    return Exported(path, made, "".join(r.kind.value[0] for r in live.steps))


def test_a_process_without_the_model_makes_the_same_pictures(exported: Exported, tmp_path: Path) -> None:
    """No write to a cache is lost, at any K; a second run is the first, bit by bit."""
    script, given, result = tmp_path / "sampling.py", tmp_path / "given.pt", tmp_path / "result.pt"
    script.write_text(SAMPLING)
    torch.save({"x": PICTURE}, given)
    moved = shutil.copy(exported.path, tmp_path / "renamed.pt2")
    environment = os.environ | {"PYTHONPATH": str(Path(toca_compile.__file__).parents[1])}
    subprocess.run([sys.executable, script, moved, given, result], check=True, cwd=tmp_path, env=environment)
    told = torch.load(result)
    assert told["unwanted"] == []
    assert told["kinds"] == exported.kinds
    torch.testing.assert_close(told["made"][0], exported.live, rtol=0, atol=1e-5)
    assert torch.equal(told["made"][0], told["made"][1])


@pytest.mark.parametrize(
    "policy",
    [
        ToCa(STEPS, interval=3, fresh_ratio=0.3),
        Composition(STEPS, Every(3), (Rule(Anchors(Hermite(0.5), 3)),)),
        BlockCache(STEPS, first=0, interval=3, order=2, basis="newton"),
    ],
    ids=["ToCa", "anchors", "a forecast of the blocks"],
)
def test_other_policies_in_compiled_files(policy: Any, tmp_path: Path) -> None:
    """Over a whole run, and over the next."""
    model = randomize(PlainDiT(depth=1))
    live = optimized(model, policy)
    batch = torch.export.Dim("batch", min=2, max=5)
    open = {name: {0: batch} for name in "xty"} if isinstance(policy, ToCa) else None  # of one: each costs a minute
    inputs = noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2)
    hoist = open is not None  # what stands in front is compiled alike in all
    toca_compile.export(model, policy, inputs, tmp_path / "m.pt2", dynamic=open, hoist=hoist)
    own = toca_compile.load(tmp_path / "m.pt2")
    for seed in range(2):
        wanted = sample(live, STEPS, noise(seed=seed))
        torch.testing.assert_close(sample(own, STEPS, noise(seed=seed)), wanted, rtol=1e-5, atol=1e-5)
        assert [r.kind for r in own.steps] == [r.kind for r in live.steps]
    for count in (3, 5) if open else ():
        wanted = sample(live, STEPS, noise(count))
        torch.testing.assert_close(sample(own, STEPS, noise(count)), wanted, rtol=1e-5, atol=1e-5)
        assert [r.k for r in own.steps] == [r.k for r in live.steps]
    if open:
        other = randomize(PlainDiT(depth=1), seed=1)
        own.update_weights(other.state_dict())
        with torch.no_grad():
            for count in (2, 3):
                given = noise(count), torch.zeros(count, dtype=torch.int64), torch.arange(count)
                torch.testing.assert_close(own(*given), other(*given), rtol=1e-5, atol=1e-5)


def test_two_loaded_models_have_two_caches_and_other_weights_are_theirs(exported: Exported) -> None:
    a, b = (toca_compile.load(exported.path) for _ in range(2))
    assert isinstance(a, LoadedModel)
    other = dit(seed=1)
    b.update_weights(other.state_dict())
    x, z = PICTURE, PICTURE
    with torch.no_grad():
        for i in range(STEPS):
            t = torch.full((4,), (STEPS - 1 - i) * 1000 // STEPS)
            x, z = x - a(x, t, torch.arange(4)).sample / STEPS, z - b(z, t, torch.arange(4)).sample / STEPS
    torch.testing.assert_close(x, exported.live, rtol=0, atol=1e-5)
    torch.testing.assert_close(z, sampled(optimized(other, POLICY)), rtol=0, atol=1e-5)


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs CMake and a C++ compiler")
@pytest.mark.skipif(
    torch.version.cuda is not None and not shutil.which("nvcc"),
    reason="CMake finds a torch for CUDA by CUDA's compiler",
)
def test_a_program_without_python_makes_the_same_pictures(exported: Exported, tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "cpp"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", prefix, str(example)], ["cmake", "--build", "."]):
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    made = [tmp_path / "made.pgm", tmp_path / "made.pt"]
    subprocess.run([tmp_path / "sample_exported", exported.path, *made], check=True)
    scheduler = DDIMScheduler.from_pretrained(example.parent / "fashion_dit" / "scheduler")
    expected = fashion_dit.sample(toca_compile.load(exported.path), scheduler, torch.arange(2), STEPS)
    torch.testing.assert_close(torch.load(made[1]), expected, rtol=1e-4, atol=1e-4)
    assert made[0].read_bytes().startswith(b"P5\n16 8\n255\n")


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose table says something else."""
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(target, "w") as copy:
        for name in file.namelist():
            data = file.read(name)
            if name.endswith("toca_compile.json"):
                told = json.loads(data)
                change(told)
                data = json.dumps(told).encode()
            copy.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda told: told["about"].update(format=99), "it is of format 99"),
        (lambda told: told["about"].update(torch="2.3.0"), "compiled by torch 2.3.0, and this is"),
        (
            lambda told: told["about"]["machine"].update(capability="AVX1024"),
            "of capability AVX1024, and this machine's",
        ),
        (lambda told: told.pop("table"), "its table cannot be read"),
        (lambda told: told["table"].pop("rows"), "its table cannot be read"),
    ],
)
def test_files_for_another_version_or_machine(
    exported: Exported, change: Callable[[dict[str, Any]], None], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=why):
        toca_compile.load(rewritten(exported.path, tmp_path / "other.pt2", change))


def test_files_that_are_not_whole_or_none_of_ours(exported: Exported, tmp_path: Path) -> None:
    data, path = exported.path.read_bytes(), tmp_path / "m.pt2"
    for size in (0, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(ExportError, match=r"no file of toca_compile\.export, or not all of it"):
            toca_compile.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello", "world")
    with pytest.raises(ExportError, match=r"was not written by toca_compile\.export"):
        toca_compile.load(path)
    with pytest.raises(ExportError, match="No such file"):
        toca_compile.load(tmp_path / "none.pt2")


@pytest.mark.parametrize("inside", [".so", "toca_compile.weights", "toca_compile.json"])
def test_a_file_with_a_wrong_byte(exported: Exported, inside: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    data = bytearray(exported.path.read_bytes())
    with zipfile.ZipFile(exported.path) as file:
        entry = next(e for e in file.infolist() if e.filename.endswith(inside))
    data[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExportError):
        toca_compile.load(path)


def test_nothing_is_left_of_what_cannot_be_written(exported: Exported, tmp_path: Path) -> None:
    """A file that is there stays as it is until the new one is whole."""
    target = tmp_path / "dit.pt2"
    target.mkdir()  # no file can take its place
    from toca_compile.exported import archive

    own = archive.read(exported.path)
    with pytest.raises(ExportError, match="cannot be written"):
        archive.write(target, own.about, own.table, own.tensors, {})
    assert [path.name for path in tmp_path.iterdir()] == ["dit.pt2"]
