"""What a GPU would launch, counted in generated code without one: it may fall, and must not grow."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.7")  # the torch that brings an older one asks for a driver

from cuda_codegen import POLICIES, Codegen, counts, timesteps
from fake_gpu import Generated, assemble, fake_gpu

import toca_compile
from tests.kernels.interpreted import told_by
from tests.models import PlainDiT
from toca_compile import FullCompute
from toca_compile.ir.printer import variant_name
from toca_compile.ir.program import Chain

pytestmark = [pytest.mark.inductor, pytest.mark.xdist_group("cuda-codegen")]

# Of the blocks of a small DiT in bfloat16: launches, and MB moved.
BLOCKS = {
    "FullCompute: template1[compute; compute]": (10, 5.46),
    "ToCa, attention: template1[compute [output, scores]; compute [output]]": (12, 6.4),
    "ToCa, attention: template1[reuse; partial]": (8, 1.33),
    "ToCa, random: template1[compute [output]; compute [output]]": (10, 5.99),
    "ToCa, random: template1[reuse; partial]": (9, 1.33),
    "TaylorSeer: template1[compute [output]; compute [output]]": (10, 5.99),
    "TaylorSeer: template1[compute, differences too [output]; compute, differences too [output]]": (10, 6.51),
    # The same with the numbers of the step in memory, as CUDA graphs have them.
    "held: ToCa, random: template1[reuse; partial]": (10, 1.33),
    "held: TaylorSeer: template1[compute, differences too [output]; compute, differences too [output]]": (10, 6.51),
}
# Of whole steps that compute no branch, however deep the model is: launches.
STEPS = {"Fora": 8, "BlockCache": 8}


def traced(depth: int = 2) -> Any:
    with torch.device("meta"):
        model = PlainDiT(size=(32, 32), width=128, depth=depth).eval().to(torch.bfloat16)
        given = torch.empty(2, 2, 32, 32, dtype=torch.bfloat16), timesteps(2), torch.empty(2, dtype=torch.int64)
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager")
    with torch.no_grad():
        opt(*given)
    return opt


def launched(depth: int) -> dict[str, int]:
    """What the last step launches that computes no branch, by policy."""
    opt = traced(depth)
    found = {}
    with fake_gpu() as made:
        codegen = Codegen(opt, made)
        for name in STEPS:
            opt.policy = POLICIES[name]
            (call,) = codegen.schedule.joined(codegen.schedule.calls[-1])
            assert isinstance(call.segment, Chain)
            code = codegen.generated(call, [0] * len(call.segment.sites))
            found[name] = len(code.launches)
            assert counts(code.launches)["Triton"] == code.source.count(".run(")
    return found


def generate_to(file: str) -> None:
    """Write a step's code, inputs for it, and what its graph makes of them on the CPU."""
    with torch.device("meta"):
        model = PlainDiT(depth=3).eval()
        given = torch.empty(2, 2, 8, 8), timesteps(2), torch.empty(2, dtype=torch.int64)
    opt: Any = toca_compile.optimize(model, FullCompute(), lowering="eager")
    with torch.no_grad():
        opt(*given)
    opt.policy = POLICIES["Fora"]
    with fake_gpu() as made:
        codegen = Codegen(opt, made)
        (call,) = codegen.schedule.joined(codegen.schedule.calls[-1])
        code = codegen.generated(call, [0] * len(call.segment.sites))
    module = codegen.executor.variants.build(call.segment, call.forms, codegen.executor.plan).module
    for node in module.graph.nodes:
        node.kwargs = {k: torch.device("cpu") if k == "device" else value for k, value in node.kwargs.items()}
    module.recompile()
    torch.manual_seed(0)
    values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    inputs = [torch.randn(v.shape) if v.is_floating_point() else torch.randint(11, v.shape) for v in values]
    with torch.no_grad():
        torch.save((code.source, inputs, list(module(*inputs))), file)


def generate() -> dict[str, Generated]:
    opt = traced()
    found: dict[str, Generated] = {}
    with fake_gpu() as made:
        codegen = Codegen(opt, made)
        for name in ("FullCompute", "ToCa, attention", "ToCa, random", "TaylorSeer"):
            opt.policy = POLICIES[name]
            for call, code in codegen.variants():
                if call.segment.sites and not isinstance(call.segment, Chain):
                    found[f"{name}: {variant_name(call.segment, call.forms)}"] = code
        held = Codegen(opt, made, held=True)
        for name in ("ToCa, random", "TaylorSeer"):
            opt.policy = POLICIES[name]
            for call, code in held.variants():
                key = f"held: {name}: {variant_name(call.segment, call.forms)}"
                if key in BLOCKS:
                    found[key] = code
    return found


def assembled(sources: list[str]) -> list[tuple[int, int]]:
    """Kernels compiled for sm_80 and for sm_90, by source."""
    known: set[tuple[str, int]] = set()
    with fake_gpu():
        return [(assemble(source, 80, known), assemble(source, 90, known)) for source in sources]


def left_behind() -> tuple[bool, bool]:
    """Whether a GPU is seen, and whether code for the CPU is right, behind it."""
    with fake_gpu():
        pass
    return torch.cuda.is_available(), torch.equal(torch.compile(torch.sin)(torch.ones(3)), torch.ones(3).sin())


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def generated(process: ProcessPoolExecutor) -> dict[str, Generated]:
    """The block's variants under four policies, by policy and name."""
    return process.submit(generate).result()


def test_launches_do_not_grow(generated: dict[str, Generated]) -> None:
    counted = {name: counts(code.launches) for name, code in generated.items()}
    assert counted.keys() == BLOCKS.keys()
    for name, (launches, moved) in BLOCKS.items():
        assert counted[name]["launches"] <= launches, name
        assert counted[name]["MB moved"] <= moved, name
        assert counted[name]["host copies"] == 0


def test_a_step_without_branches_launches_as_much_at_any_depth(process: ProcessPoolExecutor) -> None:
    found = process.submit(launched, 5).result()
    assert found.keys() == STEPS.keys()
    assert all(found[name] <= most for name, most in STEPS.items()), found


def test_kernels_make_what_the_graph_makes(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    file = str(tmp_path / "step.pt")
    process.submit(generate_to, file).result()
    assert "Combo" in torch.load(file)[0]  # loops side by side are among them
    told = told_by(f"from tests.benchmarks.run_generated import difference; print(difference({file!r}))")
    assert float(told) < 1e-6


def test_a_score_costs_half_of_its_attention(generated: dict[str, Generated]) -> None:
    code = generated["ToCa, attention: template1[compute [output, scores]; compute [output]]"]
    (attention,) = (launch.flops for launch in code.launches if launch.kind == "attention")
    assert [launch.flops for launch in code.launches if launch.kind == "triton" and launch.flops] == [attention // 2]


def test_kernels_are_counted_as_they_are_called(generated: dict[str, Generated]) -> None:
    for name, code in generated.items():
        assert counts(code.launches)["Triton"] == code.source.count(".run("), name
        assert counts(code.launches)["GEMM"] == code.source.count(" extern_kernels."), name


def test_kernels_compile_for_both_architectures(process: ProcessPoolExecutor, generated: dict[str, Generated]) -> None:
    block = "ToCa, attention: template1[compute [output, scores]; compute [output]]"
    names = (block, "ToCa, attention: template1[reuse; partial]", "ToCa, random: template1[reuse; partial]")
    sources = [generated[name].source for name in names]
    assert "column_sums_kernel" in sources[0]
    assert all("top_tokens_kernel" in source for source in sources[1:])
    for kernels in process.submit(assembled, sources).result():
        assert kernels[0] == kernels[1] > 0


def test_the_driver_is_gone_behind_it(process: ProcessPoolExecutor) -> None:
    assert process.submit(left_behind).result() == (False, True)
