"""What a GPU would launch, counted without one: Inductor's code for an H100, of every variant of the paper's systems.

    python benchmarks/cuda_codegen.py                        # needs Triton; full width, two blocks, no weights
    python benchmarks/cuda_codegen.py --systems dit --keep folder

For each variant of a block, and for a whole step of each kind: Triton kernels, matrix products, attention, other
library calls, bytes moved, copies to the host. Every kernel is compiled to machine code for sm_80 and sm_90. Results go
to ``benchmarks/results/cuda_codegen.{json,md}``; no number of them is a time.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import save
from fake_gpu import CUDA, Generated, Launch, assemble, fake_gpu, on_gpu
from paper_systems import SYSTEMS, System
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import toca_compile
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, TaylorToCa, ToCa
from toca_compile.ir.plan import Policy
from toca_compile.ir.printer import variant_name
from toca_compile.ir.program import Variant
from toca_compile.ir.state import Number
from toca_compile.ir.types import Site
from toca_compile.lowerings import inductor
from toca_compile.lowerings.fused_scores import fuse_scores
from toca_compile.passes.variants.in_memory import in_memory
from toca_compile.runtime.host_known import HostKnown
from toca_compile.runtime.schedule import Schedule, SegmentCall

Rows = list[dict[str, Any]]

POLICIES: dict[str, Policy] = {
    "FullCompute": FullCompute(),
    "Fora": Fora(12, 3),
    "ToCa, random": ToCa(12, 3, 0.1, schedule="constant", score="random"),
    "ToCa, attention": ToCa(12, 3, 0.1, schedule="constant"),
    "TaylorSeer": TaylorSeer(12, 3, 1),
    "TaylorToCa, queries": TaylorToCa(12, 3, 1, 0.1, keys="update"),
    "BlockCache": BlockCache(12, first=0, interval=3, order=1),
}
UNCACHED = "none: all that the model computes"
BLOCKS = 2  # of each kind: deeper models launch more of the same
KINDS = {"triton": "Triton", "gemm": "GEMM", "attention": "attention", "other": "other", "host copy": "host copies"}


class Codegen:
    """What the variants of one model launch; to be used inside ``fake_gpu()``, equal variants are generated once.

    Args:
        opt: an optimised model that was called once.
        made: the list of ``fake_gpu()``.
        held: numbers of the step lie in memory, as CUDA graphs need them.
    """

    def __init__(self, opt: Any, made: list[Generated], *, held: bool = False) -> None:
        (self.executor,) = opt._session.executors
        self._made, self._held = made, held
        self._known: dict[tuple[Any, ...], Generated] = {}

    @property
    def schedule(self) -> Schedule:
        """Of the policy that is followed."""
        return self.executor.schedule

    def variants(self) -> Iterator[tuple[SegmentCall, Generated]]:
        """Each variant of the plan, by a call of it; of numbers of tokens, what the plan asks for on average."""
        tokens: defaultdict[tuple[Any, int], list[int]] = defaultdict(list)
        first: dict[Any, SegmentCall] = {}
        schedule = self.schedule
        for row, calls in zip(schedule.rows, schedule.calls, strict=True):
            for call in schedule.joined(calls):
                first.setdefault(call.variant, call)
                for position, index in enumerate(call.segment.sites):
                    site = schedule.owners[index]
                    if isinstance(site, Site):
                        tokens[call.variant, position].append(row[index].computed(site))
        for variant, call in first.items():
            asked = [tokens[variant, position] for position in range(len(call.segment.sites))]
            yield call, self.generated(call, [round(sum(k) / len(k)) if k else 0 for k in asked])

    def step(self, index: int, of: Mapping[Any, Generated]) -> list[Launch]:
        """What a step launches, with what each variant does. What follows from the text or from the time alone is made
        in the first, for all steps of the run."""
        calls = self.schedule.joined(self.schedule.calls[index])
        calls = tuple(c for c in calls if not (index and (c.segment.constant or c.segment.timed)))
        return [launch for call in calls for launch in of[call.variant].launches]

    def generated(self, call: SegmentCall, tokens: Sequence[int]) -> Generated:
        """A call of a variant; ``tokens``: how many each site computes."""
        variant = self.executor.variants.build(call.segment, call.forms, self.executor.plan)
        examples = list(_examples(variant, tokens))
        if self._held:
            number = torch.empty((), dtype=torch.int64, device="meta")
            held = [False] * len(variant.values) + [slot.is_held for slot in variant.slots]
            examples = [number if there else e for e, there in zip(examples, held, strict=True)]
            variant = in_memory(variant, CUDA)
        shapes = [(e.shape, e.stride(), e.dtype) if isinstance(e, Tensor) else e for e in examples]
        key = (inductor._text(variant.module.graph), *shapes)
        if key not in self._known:
            self._known[key] = generate(variant.module, examples, self._made)
        return self._known[key]


def generate(module: fx.GraphModule, examples: Sequence[Any], made: list[Generated]) -> Generated:
    """What Inductor makes of a variant as our lowering gives it; ``examples``: as a lowering is given them."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    fuse_scores(graph)
    on_gpu(graph)
    with FakeTensorMode():
        inputs = [
            torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device=CUDA) if isinstance(e, Tensor) else e
            for e in examples
        ]
    inductor._compile(fx.GraphModule(module, graph), inputs)
    return made[-1]


def _examples(variant: Variant, tokens: Sequence[int]) -> Iterator[Any]:
    """A fake tensor or a number for each of a variant's inputs."""
    inputs = [n.meta["val"] for n in variant.module.graph.nodes if n.op == "placeholder"]
    for value, slot in zip(inputs, [None] * len(variant.values) + list(variant.slots), strict=True):
        yield tokens[slot.position] if slot is not None and slot.kind is Number.K else value


def counts(launches: Sequence[Launch]) -> dict[str, Any]:
    """How many of each kind, and the bytes."""
    kinds = Counter(launch.kind for launch in launches)
    assert set(kinds) <= set(KINDS)
    numbers: dict[str, Any] = {"launches": len(launches), **{name: kinds[kind] for kind, name in KINDS.items()}}
    return {**numbers, "MB moved": sum(launch.moved for launch in launches) / 1e6}


def optimized(system: System, *, known: bool = True) -> Any:
    """The system's model on the meta device, traced. ``known``: with timesteps whose numbers the host knows, as in a
    pipeline; without, a step computes all that the model does."""
    opt: Any = toca_compile.optimize(system.model, FullCompute(), lowering="eager")
    t = timesteps(len(system.latents))
    with torch.no_grad():
        system.call(opt, system.latents, t if known else t.plain)
    return opt


def timesteps(samples: int) -> Any:
    """A timestep for each sample, on the meta device, and known to the host."""
    return HostKnown.of(torch.empty(samples, device="meta"), torch.full((samples,), 500.0))


def measure(system: System, assembled: set[tuple[str, int]], keep: Path | None) -> tuple[Rows, Rows]:
    """A row for each variant, and one for each policy and kind of step."""
    opt, plain = optimized(system), optimized(system, known=False)
    variants: Rows = []
    steps: Rows = []
    seen = set()
    with fake_gpu() as made:
        codegen = Codegen(plain, made)
        of = {call.variant: generated for call, generated in codegen.variants()}
        steps.append({"policy": UNCACHED, "step": "full", **counts(codegen.step(0, of))})
        codegen = Codegen(opt, made)
        for name, policy in POLICIES.items():
            opt.policy = policy
            of = {}
            for call, generated in codegen.variants():
                of[call.variant] = generated
                if call.variant in seen:
                    continue
                seen.add(call.variant)
                row = {
                    "variant": variant_name(call.segment, call.forms),
                    "first of": name,
                    **counts(generated.launches),
                }
                variants.append(row)
                print(row, flush=True)
                for capability in (80, 90):
                    assemble(generated.source, capability, assembled)
                if keep is not None:
                    (keep / f"{system.name.split('-')[0]}-{len(variants)}.py").write_text(generated.source)
            kinds = [step.kind.value for step in codegen.schedule.plan.steps]
            for kind in dict.fromkeys(kinds):
                # The last of its kind: what it reads was kept, and it keeps what later steps read, if there are any.
                index = max(i for i, k in enumerate(kinds) if k == kind)
                steps.append({"policy": name, "step": kind, **counts(codegen.step(index, of))})
                print(steps[-1], flush=True)
    return variants, steps


def main() -> None:
    """Count the chosen systems and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--keep", type=Path, help="a folder for the generated sources")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(exist_ok=True)
    for name in given.systems:
        torch._dynamo.reset()
        with torch.no_grad(), torch.device("meta"):
            system = SYSTEMS[name]("meta", BLOCKS)
        assembled: set[tuple[str, int]] = set()
        variants, steps = measure(system, assembled, given.keep)
        compiled = Counter(f"sm_{capability}" for _, capability in assembled)
        title = f"{system.name}, {system.size}"
        sections = {f"{title}: variants": variants, f"{title}: whole steps": steps}
        about = f"Counted in Inductor's code for an H100, torch {torch.__version__}, Triton {version('triton')}"
        sections[f"{title}: kernels compiled"] = [dict(compiled)]
        save("cuda_codegen", "cpu", sections, about=about)


if __name__ == "__main__":
    main()
