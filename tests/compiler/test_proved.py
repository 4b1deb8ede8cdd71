"""proved: what is proved of a graph holds for the next model that has it, and for no other."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.models import PlainDiT, randomize
from tests.runs import TIMES, kinds, steps
from tests.sampling import noise
from toca_compile import Fora, PassError, ToCa, explain, optimize
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.compiler.proved import proved
from toca_compile.ir.program import Pass, Program
from toca_compile.rules.registry import RULES

aten = torch.ops.aten
FIRST = PIPELINE[:1]


def graph() -> fx.GraphModule:
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (torch.relu(x) + y,)

    return fx.symbolic_trace(forward)


def asked(module: fx.GraphModule, *inputs: Any, **told: Any) -> Program:
    return replace(Program(module, (False, True), inputs), **told)


def test_models_of_a_class_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(PlainDiT):
        """No other test's."""

    ran: list[Program] = []
    run = PassManager.run

    def counted(self: PassManager, program: Program) -> Program:
        ran.append(program)
        return run(self, program)

    monkeypatch.setattr(PassManager, "run", counted)
    policies = ToCa(8, 4, 0.3, schedule="constant"), Fora(8, 2)
    models = [randomize(Own(), seed=seed) for seed in (0, 1)]
    opts = [optimize(model, policy, lowering="eager") for model, policy in zip(models, policies, strict=True)]
    results = [steps(opt, noise(), TIMES) for opt in opts]
    assert len(ran) == 1
    assert explain(opts[0]).program is explain(opts[1]).program
    assert [kinds(opt) for opt in opts] == ["fpppfppp", "frfrfrfr"]
    for opt, result, model in zip(opts, results, models, strict=True):
        again = optimize(model, opt.policy, lowering="eager", hoist=False)  # other passes
        assert torch.allclose(steps(again, noise(), TIMES), result, atol=1e-5)
    assert len(ran) == 2


def test_what_the_passes_read_is_told_apart() -> None:
    module, x, y = graph(), torch.ones(4, 6), torch.ones(4, 6)
    with torch.inference_mode():
        inference = torch.ones(4, 6)
    first = proved(asked(module, x, y), FIRST)
    assert proved(asked(module, torch.zeros(4, 6), torch.zeros(4, 6)), FIRST)[0] is first[0]
    others = [
        asked(module, torch.ones(8, 6), torch.ones(8, 6)),
        asked(module, x.double(), y),
        asked(module, torch.ones(6, 4).T, y),
        asked(module, x, torch.nn.Parameter(y)),
        asked(module, x, inference),
        asked(module, x, x),
        asked(module, torch.ones(30)[2:26].view(4, 6), y),
        asked(module, x, torch.ones(1)),
        asked(module, x, 2),
        asked(module, x, 3),
        asked(module, x, y, static_inputs=(False, False)),
        asked(module, x, y, grid=(2, 2)),
        asked(module, x, y, known=(True, False)),
        asked(module, x, y, fragment=True),
    ]
    made = [first[0], *(proved(other, FIRST)[0] for other in others)]
    assert len(set(map(id, made))) == len(made)
    assert proved(asked(module, x, y), PIPELINE[:2])[0].types is not None
    assert proved(asked(graph(), x, y), FIRST)[0] is not first[0]


def test_another_rule_is_another_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, y = graph(), torch.ones(4, 6), torch.ones(4, 6)
    first = proved(asked(module, x, y), PIPELINE[:2])[0]
    monkeypatch.setitem(RULES, aten.relu.default, replace(RULES[aten.relu.default], pointwise=False))
    assert proved(asked(module, x, y), PIPELINE[:2])[0] is not first


def test_what_cannot_be_compared_is_like_nothing() -> None:
    module, x = graph(), torch.ones(4, 6)
    for other in (torch.eye(4, 6).to_sparse(), object()):
        program = asked(module, x, other)
        assert proved(program, ())[0] is program
        again = replace(program)
        assert proved(again, ())[0] is again


def test_a_failure_is_not_kept() -> None:
    module, x, y, fails = graph(), torch.ones(4, 6), torch.ones(4, 6), [True, False]

    def once(program: Program) -> Program:
        if fails.pop(0):
            raise ValueError("once")
        return program

    passes = (*FIRST, Pass(once))
    with pytest.raises(PassError, match="once failed after capture"):
        proved(asked(module, x, y), passes)
    assert proved(asked(module, x, y), passes)[0].inputs == ()


def test_it_goes_with_the_graph() -> None:
    module = graph()
    program = weakref.ref(proved(asked(module, torch.ones(4, 6), torch.ones(4, 6)), FIRST)[0].module)
    assert program() is not None
    del module
    gc.collect()  # the graph, and with it what is known of it
    gc.collect()
    assert program() is None
