"""The layering, the packaging and the size of files, checked from the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "toca_compile"

# Each layer may import itself (not a sibling) and those before it.
LAYERS = [
    {"errors", "hooks", "progress", "kernels", "direct"},
    {"ir", "ops"},
    {"rules", "policies", "runtime", "lowerings"},
    {"passes"},
    {"compiler"},
    {"session"},
    {"backend"},
    {"traced"},
    {"report", "model"},
    {"in_place"},
    {"diffusers"},
    {"api"},
    {"serving"},
    {"exported"},
    {"quality"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    if relative.name == "__main__.py":  # a command, which nothing imports
        return "cli"
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
    models = {name for name in listed if name.startswith("toca_compile.demo.models.")}  # data, from elsewhere
    assert listed - models == on_disk


def test_passes_are_reached_through_the_link_and_are_short() -> None:
    assert (PACKAGE / "passes").is_symlink()
    for path in (ROOT / "passes").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_importing_passes_by_its_folder_is_refused() -> None:
    source = (ROOT / "passes" / "__init__.py").read_text()
    with pytest.raises(ImportError, match=r"toca_compile\.passes"):
        exec(compile(source, "passes", "exec"), {"__name__": "passes"})


def test_functions_take_at_most_six_parameters() -> None:
    """More that travel together are a dataclass. The parameters of a kernel are its op's schema."""
    for path in (*FILES, *(ROOT / "passes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
            given = node.args
            every = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
            taken = [a.arg for a in every if a is not None and a.arg not in ("self", "cls")]
            kernel = path.parent in (PACKAGE / "ops", PACKAGE / "kernels") and any(
                d.startswith(("op(", "triton.jit")) for d in decorators
            )
            assert kernel or len(taken) <= 6, f"{path}:{node.lineno} takes {', '.join(taken)}"


# A test goes through public calls. Whether the session itself is freed, only a reference to it can tell.
INSIDE = {"tests/test_session.py"}


def test_no_test_reaches_into_the_session() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert "_session" not in names or str(path.relative_to(ROOT)) in INSIDE, path


def sources_and_tests() -> dict[str, set[str]]:
    """For each folder of the source tree with tests of its own: the names of its files, by the folder of the tests."""
    folders = [p for p in (ROOT / "tests").rglob("*") if p.is_dir() and any(p.glob("test_*.py"))]
    relative = [p.relative_to(ROOT / "tests") for p in folders if p != ROOT / "tests"]
    sources = {f"tests/{r}": ROOT / r if r.parts[0] == "passes" else PACKAGE / r for r in relative}
    return {
        name: {p.stem for p in folder.glob("*.py")} - {"__init__"}
        for name, folder in sources.items()
        if folder.is_dir()
    }


def test_a_file_of_tests_is_named_after_what_it_tests() -> None:
    """``test_inductor_machine.py`` and ``test_inductor.py`` are both about ``inductor.py``."""
    for folder, names in sources_and_tests().items():
        for path in (ROOT / folder).glob("test_*.py"):
            assert any(path.stem == f"test_{n}" or path.stem.startswith(f"test_{n}_") for n in names), path


def test_each_pass_has_tests_of_its_own() -> None:
    for folder, names in sources_and_tests().items():
        for name in names if folder.startswith("tests/passes") else ():
            assert (ROOT / folder / f"test_{name}.py").exists(), f"{folder}/test_{name}.py"
    assert {"tests/passes", "tests/passes/proof", "tests/passes/variants"} <= set(sources_and_tests())


def test_only_what_compiles_knows_inductor_and_only_the_demo_diffusers() -> None:
    for path in FILES:
        text = path.read_text()
        if part(path) not in ("lowerings", "backend", "kernels"):  # a kernel in C++ is compiled as Inductor compiles
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
