"""The layering, the packaging and the size of files, checked from the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "toca_compile"

# Each layer may import itself (not a sibling) and those before it.
LAYERS = [
    {"errors"},
    {"ir", "ops"},
    {"rules", "policies", "runtime", "lowerings"},
    {"passes"},
    {"compiler"},
    {"session"},
    {"backend"},
    {"report", "model"},
    {"in_place"},
    {"diffusers"},
    {"api"},
    {"quality"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.ImportFrom) and node.module == "toca_compile":
            names = [f"toca_compile.{a.name}" for a in node.names]
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("toca_compile.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    assert own in LEVEL, f"{own} has no layer"
    for other in imports(path):
        allowed = other == own or LEVEL[other] < LEVEL[own]
        assert allowed, f"toca_compile.{own} imports toca_compile.{other}"


def test_every_package_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(toca_compile[\w.]*)"', text.split("packages = [")[1].split("]")[0]))
    own = (p.parent.relative_to(PACKAGE).parts for p in PACKAGE.rglob("__init__.py"))
    passes = (p.parent.relative_to(ROOT).parts for p in (ROOT / "passes").rglob("__init__.py"))
    on_disk = {".".join(("toca_compile", *parts)) for parts in (*own, *passes)}
    assert listed == on_disk


def test_passes_are_reached_through_the_link_and_are_short() -> None:
    assert (PACKAGE / "passes").is_symlink()
    for path in (ROOT / "passes").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_importing_passes_by_its_folder_is_refused() -> None:
    source = (ROOT / "passes" / "__init__.py").read_text()
    with pytest.raises(ImportError, match=r"toca_compile\.passes"):
        exec(compile(source, "passes", "exec"), {"__name__": "passes"})


def test_only_lowerings_and_the_backend_know_inductor_and_only_the_demo_diffusers() -> None:
    for path in FILES:
        text = path.read_text()
        if part(path) not in ("lowerings", "backend"):
            assert "torch._inductor" not in text, path
        if part(path) != "demo":
            assert not re.search(r"^\s*(from|import) diffusers", text, re.M), path


def test_no_model_is_named_in_the_compiler() -> None:
    """No class name, module path or shape constant of a model."""
    for path in FILES:
        if part(path) in ("demo", "policies", "cli"):
            continue
        code = ast.unparse(ast.parse(path.read_text()))
        for name in ("Transformer2DModel", "BasicTransformerBlock", "transformer_blocks", "PixArt", "Flux", "adaLN"):
            assert name not in code.replace(f"'{name}", "") or "diffusers" in code, f"{name} in {path}"
