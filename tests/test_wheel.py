"""The package as a wheel: complete, and usable from any folder of an environment that has no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    # From a copy: a build leaves folders behind.
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a checkout")
    for name in files.stdout.split("\n"):
        path = ROOT / name
        if path.is_file() and not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-compile",
        "--target",
        str(folder),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=300)
    return folder


def _run(code: str, site: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=site.parent, env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    """The list of packages stands by hand in pyproject.toml."""
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {f"toca_compile/{p.relative_to(ROOT / 'toca_compile')}" for p in (ROOT / "toca_compile").rglob("*.py")}
    ours |= {f"toca_compile/passes/{p.relative_to(ROOT / 'passes')}" for p in (ROOT / "passes").rglob("*.py")}
    assert len(ours) > 100
    assert ours <= names
    assert "toca_compile/py.typed" in names
    assert not [n for n in names if n.startswith(("passes/", "tests/", "examples/", "benchmarks/"))]


def test_the_demo_runs_from_any_folder(installed: Path) -> None:
    """Its command is there; its model is found beside the installed package, and samples with caching."""
    code = """
from importlib.metadata import distribution
import torch, toca_compile
from pathlib import Path
from toca_compile.demo import fashion_dit, fashion_mnist
here = Path(toca_compile.__file__).resolve().parent
assert here in fashion_dit.default_model().parents and "site" in here.parts, here
model, sampler = fashion_dit.model_and_sampler()
opt = toca_compile.optimize(model, toca_compile.Fora(6, 3), lowering="eager")
pictures = sampler(opt, 6, 0, 1)
print([s.kind.value for s in opt.steps], tuple(pictures.shape), bool(pictures.isfinite().all()))
(command,) = [e for e in distribution("toca-compile").entry_points if e.group == "console_scripts"]
assert callable(command.load())
fashion_mnist.load_classifier(fashion_dit.default_model().parent / "fashion_classifier")
"""
    assert _run(code, installed).strip() == "['full', 'reuse', 'reuse', 'full', 'reuse', 'reuse'] (1, 1, 28, 28) True"
