"""Every kind of step is counted, in one spelling: in the report and in the table of a comparison."""

import io
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import BlockCache, DuCa, Fora, FullCompute, TaylorSeer, ToCa
from toca_compile.ir.plan import Policy

CASES: list[tuple[Policy, str]] = [
    (ToCa(8, 4, 0.3, schedule="constant"), "2 full, 6 partial"),
    (TaylorSeer(8, 3, 2), "3 full, 3 forecast, 2 reuse"),  # one full step makes no differences
    (TaylorSeer(8, 3, 0), "3 full, 5 reuse"),
    (Fora(8, 3), "3 full, 5 reuse"),
    (DuCa(8, 4, 0.3, schedule="constant"), "2 full, 4 partial, 2 skip"),
    (BlockCache(8, 0, interval=4), "2 full, 6 skip"),
    (BlockCache(8, threshold=1e-6), "8 full"),  # what the last run decided
    (FullCompute(), "1 full"),  # repeated for as long as it is called
]


def test_the_report_counts_every_kind_of_step() -> None:
    opt = toca_compile.optimize(randomize(PlainDiT(depth=2)), FullCompute(), lowering="eager")
    for policy, text in CASES:
        opt.policy = policy
        sample(opt, 8, noise())
        report = toca_compile.explain(opt)
        assert str(report.step_counts) == text, policy
        assert sum(report.step_counts.values()) == len(report.schedule), policy
        line = next(line for line in str(report).splitlines() if line.startswith(f"{text}; "))
        told = line.split("GFLOPs of a step: ")[1].split(" (means)")[0]
        flops = {kind: f"{float(report.flops(kind)) / 1e9:.3f}" for kind in report.step_counts}
        assert told == ", ".join(f"{kind} {number}" for kind, number in flops.items()), policy


def test_a_comparison_counts_every_kind_of_step() -> None:
    rich = pytest.importorskip("rich.console")
    from toca_compile.quality.compare import Row, measure, print_table

    model = randomize(PlainDiT(depth=1))
    nets: dict[str, Any] = {"uncached": model}
    for policy, _ in CASES[1:6:2]:
        torch._dynamo.reset()
        nets[type(policy).__name__] = toca_compile.optimize(model, policy, lowering="eager")

    def row(name: str, net: Any) -> Row:
        return Row(name, lambda _: sample(net, 8, noise()), None if net is model else net)

    rows = [row(*item) for item in nets.items()]
    console = rich.Console(file=io.StringIO(), width=200)
    measure(rows, repeats=1, device="cpu", ticks=8, console=console)
    print_table(console, rows, peak=1.0)
    assert [r.steps for r in rows] == ["8 full", *(text for _, text in CASES[1:6:2])]
    assert all(r.steps in console.file.getvalue() for r in rows)
