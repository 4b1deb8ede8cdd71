"""PassManager: a pass that breaks the program is named."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from tests.programs import tiny_program
from toca_compile import PassError
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.ir.program import Pass, Program

aten = torch.ops.aten


def breaking(**change: Any) -> Pass:
    def broken_pass(program: Program) -> Program:
        return replace(program, **{k: f(program) for k, f in change.items()})

    return Pass(broken_pass)


def mutates(program: Program) -> fx.GraphModule:
    graph = program.module.graph
    node = next(n for n in graph.nodes if n.target is aten.relu.default)
    with graph.inserting_after(node):
        graph.call_function(aten.relu_.default, (node,)).meta.update(node.meta)
    return program.module


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (breaking(module=mutates), "mutates"),
        (breaking(segments=lambda u: u.segments[:-1]), "no segment computes"),
        (breaking(segments=lambda u: u.segments[::-1]), "runs before its inputs"),
        (
            breaking(sites=lambda u: (replace(u.sites[0], source=u.sites[0].output), *u.sites[1:])),
            "inside its own branch",
        ),
    ],
)
def test_a_broken_pass_is_named(broken: Pass, says: str) -> None:
    with pytest.raises(PassError, match=rf"broken-pass failed after capture, .*{says}"):
        tiny_program((*PIPELINE, broken))
