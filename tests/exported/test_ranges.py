"""Ranges: one size of the arguments left open, here how many tokens there are; without a compiler."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.in_memory import POLICIES, STEPS, loaded
from tests.models import JointDiT, PlainDiT, randomize, timestep_features
from tests.pipelines import flux, run
from tests.pipelines.builders import flux_pipe
from tests.runs import optimized
from tests.sampling import gaussian, noise
from toca_compile import Composition, ExportError, Fora, LoadedModel, PolicyError, ToCa
from toca_compile.ir.actions import Partial
from toca_compile.ir.plan import Plan
from toca_compile.ir.types import Site
from toca_compile.policies import Every, Rule, Share

PATCHES, WORDS = torch.export.Dim("patches", min=8, max=40), torch.export.Dim("words", min=2, max=9)
OPEN = {"x": {1: PATCHES}}


@pytest.fixture(scope="module")
def joint() -> nn.Module:
    return randomize(JointDiT(depth=1))


@pytest.fixture(scope="module")
def live(joint: nn.Module) -> Any:
    """One live model, traced at each size once."""
    return optimized(joint, Fora(STEPS, 3))


def inputs(patches: int = 8, words: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return gaussian(2, patches, 4), torch.zeros(2, dtype=torch.int64), gaussian(2, words, 6, seed=1)


def sampled(model: Any, patches: int, words: int = 3) -> Tensor:
    x, _, text = inputs(patches, words)
    with torch.no_grad():
        for i in range(STEPS):
            x = x - model(x, torch.full((2,), 900 - 100 * i), text) / STEPS
    return x


def same(own: Any, live: Any, *sizes: tuple[int, int]) -> None:
    """But for rounding, with as many tokens at each site."""
    for patches, words in sizes:
        made, wanted = sampled(own, patches, words), sampled(live, patches, words)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
        assert [(r.kind, r.k) for r in own.steps] == [(r.kind, r.k) for r in live.steps]


@pytest.mark.parametrize(
    "policy",
    [POLICIES[2], POLICIES[8], POLICIES[12]],
    ids=["ToCa", "TaylorToCa", "a test at run time"],
)
def test_any_number_of_tokens_of_a_range(joint: nn.Module, live: Any, policy: Any) -> None:
    """At the sizes that were traced, 8, 24 and 40, and at another."""
    own = loaded(joint, policy, inputs(), dynamic=OPEN)
    live.policy = policy
    same(own, live, (8, 3), (24, 3), (31, 3), (40, 3))
    assert len({tuple(r.k.values()) for r in own.steps}) > 1
    for patches in (7, 41):
        with pytest.raises(ExportError, match=rf"for patches from 8 to 40.*\[2, {patches}, 4\]"):
            own(*inputs(patches))


def test_any_number_of_words_and_other_weights(joint: nn.Module, live: Any) -> None:
    live.policy = Fora(STEPS, 3)
    own = loaded(joint, live.policy, inputs(), dynamic={"text": {1: WORDS}})
    same(own, live, (8, 3), (8, 7))
    other = randomize(JointDiT(depth=1), seed=1)
    own.update_weights(other.state_dict())
    for words in (3, 7, 9):
        with torch.no_grad():
            torch.testing.assert_close(own(*inputs(8, words)), other(*inputs(8, words)), rtol=0, atol=1e-6)


def test_the_tokens_of_another_size_make_another_picture(joint: nn.Module, live: Any) -> None:
    """What follows from the size is read at the call's: a table that is off by one does not go unnoticed."""
    live.policy = POLICIES[3]
    own = loaded(joint, live.policy, inputs(), dynamic=OPEN)
    same(own, live, (31, 3))
    table = own._table
    shifted = {name: (*values[1:], values[-1]) for name, values in table.sized.items()}
    off = LoadedModel(own._about, replace(table, sized=shifted), own._tensors, own._entries)
    assert not torch.allclose(sampled(off, 31), sampled(own, 31), rtol=0, atol=1e-3)
    assert [r.k for r in off.steps] != [r.k for r in live.steps]


@dataclass(frozen=True)
class Own:
    """A policy of the user's: ``kind`` says what it follows from."""

    kind: str

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        if self.kind == "a size" and sites[0].axis.size == 17:
            raise PolicyError("17 is no number")
        if self.kind == "the grid":
            assert sites[0].axis.grid is not None
            share = sites[0].axis.grid[1] / 12
        else:
            share = 5.5 / sites[0].output.meta["val"].shape[1]  # of the graph that was traced
        partial = Rule(Partial(), kinds=("mlp",))
        return Composition(4, Every(2), (partial,), how_many=Share(share)).plan(sites)


class Placed(JointDiT):
    """With a table that says where each token lies."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + places.sum(-1, keepdim=True), t, text)


def test_a_grid_that_a_policy_asks_for_is_named() -> None:
    """Cells of the picture get a bonus, and each size is another picture: that of the example at none but its own."""
    places = torch.cartesian_prod(torch.arange(2.0), torch.arange(4.0))
    few = torch.export.Dim("patches", min=8, max=11)  # of which each begins as the example does
    open = {"x": {1: few}, "places": {0: few}}
    with pytest.raises(ExportError, match=r"the grid in which tokens lie.* \(bonus=0 does without\), follows from it"):
        loaded(Placed(depth=1).eval(), POLICIES[2], (*inputs(), places), dynamic=open)


class Wide(PlainDiT):
    """The tokens of a picture of any width, whose positions are none of the model's."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(timestep_features(t, 16)) + self.labels(y)
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.head(self.norm(tokens))


def test_a_grid_that_follows_from_the_size() -> None:
    """As the graph shows it, for a policy of the user's that asks for it."""
    model, policy = randomize(Wide(depth=1)), Own("the grid")
    columns = torch.export.Dim("columns", min=3, max=9)
    inputs = noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2)
    own, live = loaded(model, policy, inputs, dynamic={"x": {3: 2 * columns}}), optimized(model, policy)
    seen = set()
    with torch.no_grad():
        for width in (6, 14):
            for i in range(4):
                given = noise(size=(8, width), seed=i), torch.full((2,), 900 - 100 * i), torch.arange(2)
                torch.testing.assert_close(own(*given), live(*given), rtol=0, atol=1e-6)
            assert [r.k for r in own.steps] == [r.k for r in live.steps]
            seen.add(own.steps[1].k["blocks.0.mlp"])
        assert seen == {3, 16}  # columns² / 3
        with pytest.raises(ExportError, match="columns from 3 to 9"):
            own(noise(size=(8, 15)), *inputs[1:])


def test_one_graph_of_all_steps_is_for_fixed_sizes(joint: nn.Module) -> None:
    with pytest.raises(ExportError, match="leave dynamic out"):
        toca_compile.program(joint, Fora(4, 2), inputs(), dynamic=OPEN)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (
            ToCa(4, 2, fresh_ratio=0.02),
            r"does in step 2 \(reuse where it is 8, partial where it is 40\) follows from it",
        ),
        (Own("a size"), "patches from 8 to 40: where it is 17, 17 is no number"),
        (Own("the graph"), r"how many tokens blocks\.0\.mlps\.1 computes in step 1 follows from it"),
    ],
    ids=["no token at a small size", "no plan", "of the traced graph"],
)
def test_policies_that_no_range_can_hold(joint: nn.Module, policy: Any, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        loaded(joint, policy, inputs(), dynamic=OPEN)


def test_a_pipeline_makes_pictures_of_other_sizes() -> None:
    """One file in the unmodified pipeline; how the tokens lie is no matter to a policy without a bonus for cells."""
    pipe, call = flux_pipe("FluxPipeline", flux(double=1, single=1))
    policy, tokens = ToCa(6, interval=3, fresh_ratio=0.3, bonus=0.0), torch.export.Dim("tokens", min=12, max=48)
    open = {"hidden_states": {1: tokens}, "img_ids": {0: tokens}}
    own = loaded(pipe, policy, call | {"num_inference_steps": 6}, dynamic=open)
    pictures = [call, call | {"height": 24}]
    toca_compile.optimize(pipe, policy, lowering="eager")
    wanted = [run(pipe, picture, 6) for picture in pictures]
    toca_compile.restore(pipe)
    assert not torch.allclose(run(pipe, pictures[1], 6), wanted[1], rtol=0, atol=1e-3)
    pipe.transformer = own
    for picture, made in zip(pictures, wanted, strict=True):
        torch.testing.assert_close(run(pipe, picture, 6), made, rtol=0, atol=1e-5)
    assert own.policy == policy
    with pytest.raises(ExportError, match=r"hidden_states from 12 to 48.*\[1, 64, 16\]"):
        run(pipe, call | {"height": 32, "width": 32}, 6)
