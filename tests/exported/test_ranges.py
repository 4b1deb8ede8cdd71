"""Ranges: one size of the arguments left open, here how many tokens there are; without a compiler."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tests.in_memory import POLICIES, STEPS, loaded
from tests.models import JointDiT, randomize
from tests.runs import optimized
from tests.sampling import gaussian
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
        n = sites[0].output.meta["val"].shape[1]  # of the graph that was traced
        partial = Rule(Partial(), kinds=("mlp",))
        return Composition(4, Every(2), (partial,), how_many=Share(5.5 / n)).plan(sites)


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


def test_a_table_of_positions_leaves_the_number_of_tokens_open() -> None:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=0, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    ).eval()  # fmt: skip

    def given(height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        return {
            "hidden_states": gaussian(1, height * width, 4, seed=seed), "encoder_hidden_states": gaussian(1, 5, 32),
            "pooled_projections": gaussian(1, 32), "timestep": torch.ones(1), "img_ids": places.float(),
            "txt_ids": torch.zeros(5, 3),
        }  # fmt: skip

    tokens = torch.export.Dim("tokens", min=8, max=64)
    policy = ToCa(STEPS, interval=4, fresh_ratio=0.3, bonus=0.0)
    own = loaded(model, policy, given(4, 4), dynamic={"hidden_states": {1: tokens}, "img_ids": {0: tokens}})
    live = optimized(model, policy)
    with torch.no_grad():
        for seed in range(STEPS):
            made, wanted = (model(**given(5, 6, seed)).sample for model in (own, live))
            torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
