"""A run that goes on in another graph: caches that are true there go with it, others are made anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.programs import tiny_program
from tests.runs import kinds, optimized
from tests.sampling import noise
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa
from toca_compile.ir.program import GraphPlan
from toca_compile.ir.state import Number
from toca_compile.policies import Composition, Every, Queries, Rule, Share
from toca_compile.runtime.schedule import Schedule

CACHING = {
    "FORA": Fora(6, 3),
    "ToCa": ToCa(6, interval=3, fresh_ratio=0.3, schedule="constant"),
    "Taylor": TaylorSeer(6, 3, 2),
    "blocks": BlockCache(6, first=1, interval=3, order=1),
    "blocks by a test": BlockCache(6, first=1, interval=3, threshold=50.0),
    "queries": Composition(6, Every(3), (Rule(do=Queries(keys="update")),), how_many=Share(0.3)),
}


class Cast(PlainDiT):
    """Its blocks see one dtype, whichever the latents have."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.to(self.embed.weight.dtype), t, y).to(x.dtype)


@contextmanager
def called(opt: Any, step: int) -> Iterator[None]:
    """One step, as a pipeline tells it."""
    with torch.no_grad(), opt.cache_context("default", step_index=step):
        yield


def given(step: int, double: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = noise() + 0.1 * step
    return x.double() if double else x, torch.full((2,), 900 - 100 * step), torch.arange(2)


def test_caches_are_carried_over() -> None:
    """From one step on the latents have another dtype, and the steps are those of latents that never had another."""
    opt = optimized(randomize(Cast()), FullCompute())
    for name, policy in CACHING.items():
        opt.policy = policy
        wanted = []
        for step in range(6):
            with called(opt, step):
                wanted.append(opt(*given(step)))
        alike = kinds(opt)
        assert alike != "ffffff", name
        for at in (1, 2, 4):
            for step in range(6):
                with called(opt, step):
                    out = opt(*given(step, double=step >= at))
                assert torch.equal(out.float(), wanted[step]), (name, at, step)
            assert kinds(opt) == alike, (name, at)
            assert [r.index for r in opt.steps] == [0, 1, 2, 3, 4, 5]
            assert opt.cache_bytes == 0
    assert toca_compile.summary(opt).graphs == 2


def test_another_graph_without_the_same_blocks_computes_everything(caplog: pytest.LogCaptureFixture) -> None:
    """Blocks in another dtype keep nothing that is true here. The run goes on all the same, and its forecasts grow from
    what the graph itself computed."""
    model = randomize(PlainDiT())
    opt = optimized(model, TaylorSeer(8, 2, 2))
    plain = {}
    for step in range(8):
        rows = 2 if step < 5 else 1
        x, t, y = (v[:rows] for v in given(step))
        with called(opt, step):
            out = opt(x, t, y)
        with torch.no_grad():
            plain[step] = torch.equal(out, model(x, t, y))
    assert [r.kind.value for r in opt.steps] == [
        "full", "reuse", "full", "forecast", "full", "full", "full", "forecast",
    ]  # fmt: skip
    assert [r.index for r in opt.steps] == list(range(8))
    assert [step for step, same in plain.items() if same] == [0, 2, 4, 5, 6]
    assert not [record for record in caplog.records if "missed step" in record.message]


def test_forecasts_of_a_graph_that_came_late() -> None:
    """They go as far back as it was there, whatever the plan says of steps before."""
    program = tiny_program()
    site = program.sites[0]
    late = Schedule(program, GraphPlan(TaylorSeer(12, 2, 2).plan(program.sites)), start=5)
    moves = {
        step: [late.number(step, site, Number.MOVE, order) for order in (1, 2)]
        for step in range(5, 12)
        if not late.rows[step][0].dense
    }
    # Step 5 was planned as a forecast. 6 makes the first difference, and 8 the second.
    assert moves == {7: [1, 0], 9: [1, 1], 11: [1, 1]}
    assert late.rows[5][0].dense
    assert late.steps == 12
    assert [late.number(6, site, Number.KEEP, order) for order in (1, 2)] == [1, 1]
    assert late.number(8, site, Number.KEEP, 1) == 2


def test_an_endless_plan_goes_on_in_its_last_row() -> None:
    program = tiny_program()
    late = Schedule(program, GraphPlan(replace(Fora(4, 4).plan(program.sites), endless=True)), start=9)
    assert late.steps is None
    assert len(late.rows) == 11
    assert ["full" if row[0].dense else row[0].word for row in late.rows[8:]] == ["reuse", "full", "reuse"]


def test_blocks_that_differ_in_a_number_carry_nothing() -> None:
    class Doubled(Cast):
        """Doubles what enters a block, where the latents are float64."""

        factor = 1.0

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.factor = 2.0 if x.dtype == torch.float64 else 1.0
            return super().forward(x, t, y)

    class Scaling(nn.Module):
        def __init__(self, owner: PlainDiT, inner: nn.Module) -> None:
            super().__init__()
            self.owner, self.inner = [owner], inner  # no submodule

        def forward(self, x: Tensor, c: Tensor) -> Any:
            return self.inner(x * self.owner[0].factor, c)

    model = randomize(Doubled())
    model.blocks = nn.ModuleList(Scaling(model, b) for b in model.blocks)  # type: ignore[union-attr]
    opt = optimized(model, Fora(6, 3))
    for step in range(6):
        with called(opt, step):
            opt(*given(step, double=step >= 2))
    assert kinds(opt) == "fr" + "ffrr"
