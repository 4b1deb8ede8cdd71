"""A model whose steps are one graph, called as the model itself."""

from typing import Any

import pytest
import torch
from torch import nn

import toca_compile
from tests.in_memory import POLICIES, STEPS, whole
from tests.models import Halved, PlainDiT, randomize
from tests.pair import Pair
from tests.runs import optimized
from tests.sampling import noise, sample
from toca_compile import BlockCache, ExportError, Fora, ProgramModel
from toca_compile.compiler.emit_step import COND, SWITCH

INPUTS = (noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(PlainDiT(depth=1))


@pytest.fixture(scope="module")
def toca(model: nn.Module) -> ProgramModel:
    return toca_compile.program(model, POLICIES[2], INPUTS)


@pytest.mark.parametrize("policy", [POLICIES[8], BlockCache(STEPS, threshold=0.35, order=1)], ids=lambda p: str(p)[:20])
def test_a_run_is_the_live_one_and_so_is_the_next(policy: Any) -> None:
    model = randomize(PlainDiT(depth=2))
    live = optimized(model, policy)
    for own in (toca_compile.program(model, policy, INPUTS), whole(model, policy, INPUTS)):
        for seed in range(2):
            torch.testing.assert_close(sample(own, STEPS, noise(seed=seed)), sample(live, STEPS, noise(seed=seed)))
            assert [(r.kind, r.k) for r in own.steps] == [(r.kind, r.k) for r in live.steps]
        assert own.policy == policy
        assert own.cache_bytes == live.cache_bytes
        assert len({r.kind for r in own.steps}) > 1


def test_compiled_by_the_user_as_one(toca: ProgramModel) -> None:
    wanted = sample(toca, STEPS, noise())
    toca.compile(backend="eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert torch.equal(sample(toca, STEPS, noise()), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_passes_and_other_weights(model: nn.Module, toca: ProgramModel) -> None:
    toca.reset()
    other = randomize(PlainDiT(depth=1), seed=5)
    toca.update_weights(other.state_dict())
    live = optimized(other, POLICIES[2])
    made = []
    for opt in (toca, live):
        for i in range(STEPS):
            for name in ("with", "without"):
                with torch.no_grad(), opt.cache_context(name):
                    made.append(opt(noise(seed=i) + len(name), torch.full((2,), 900 - i), torch.arange(2)))
    for a, b in zip(made[: 2 * STEPS], made[2 * STEPS :], strict=True):
        torch.testing.assert_close(a, b)
    toca.update_weights(model.state_dict())


def test_the_graph_alone_counts_its_steps(model: nn.Module, toca: ProgramModel) -> None:
    """Called again and again with its own buffers, by nobody who knows which step it is."""
    live = optimized(model, POLICIES[2])
    toca.reset()
    values = {place: model.get_parameter(name) for place, name in toca._table.weights.items()}
    given = dict(zip(("x", "t", "y"), INPUTS, strict=True))
    toca.graph.get_buffer("step").zero_()
    for step in range(STEPS):
        given |= {"x": noise(seed=step), "t": torch.full((2,), 900 - 100 * step)}
        inputs = [
            values[place] if place in values else given[toca._table.inputs[place]]
            for place in range(len(toca._table.weights) + len(toca._table.inputs))
        ]
        with torch.no_grad():
            (out,) = toca.graph(*inputs, *toca.rows(step))
            torch.testing.assert_close(out, live(*given.values()))


def test_models_that_no_graph_can_hold() -> None:
    with pytest.raises(ExportError, match=r"torch\.compile split it"):
        toca_compile.program(randomize(Halved(depth=2)), Fora(4, 2), INPUTS)
    with pytest.raises(ExportError, match="pass the pipeline's transformer"):
        toca_compile.program(Pair(), Fora(4, 2), {"num_inference_steps": 4})
    for given in ("dynamic", "timesteps"):
        with pytest.raises(ExportError, match=f"leave {given} out"):
            toca_compile.program(nn.Linear(2, 2), Fora(4, 2), torch.zeros(2, 2), **{given: [1.0]})


def test_it_prints(toca: ProgramModel) -> None:
    assert f"= {(SWITCH or COND).name()}(" in str(toca)
