"""HyCa: each group of channels by its own rule, and groups that are found."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import anchors as literal
from tests.quality.test_evaluation import Counting
from tests.sampling import noise, sample
from toca_compile import Composition, PolicyError
from toca_compile.ir.anchors import Ring
from toca_compile.policies import Anchors, ByChannel, Dmd, Foca, Hermite, Listed, Polynomial, Rule, SkipBlocks
from toca_compile.quality.calibration import channel_rules, rules_of

FULL = (0, 1, 4, 6, 7, 11)
GROUPS = tuple(i % 3 for i in range(16))
BY = ByChannel((Polynomial(1), Foca(), Hermite(0.7)), GROUPS)


def by_group(anchors: list[literal.Anchor], step: int) -> Tensor:
    """Each channel by the literal form of its rule."""
    parts = [anchors[-1][1].double(), literal.foca(anchors, step), literal.hicache(0.7)(anchors, step)]
    return torch.stack([parts[group][..., i] for i, group in enumerate(GROUPS)], -1)


def test_equal_to_its_literal_form(dit: tuple[Any, Any]) -> None:
    model, opt = dit
    x = noise(2, (6, 10), seed=3)
    for kept, blocks in product((1, 3), (False, True)):
        do = Anchors(BY, kept)
        opt.policy = Composition(14, Listed(FULL), (Rule(SkipBlocks(do=do) if blocks else do),))
        oracle = literal.AnchorOracle(model, FULL, kept, by_group if kept > 1 else lambda a, _: a[-1][1], blocks=blocks)
        expected = sample(oracle, 14, x)
        bound = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(sample(opt, 14, x), expected, rtol=1e-4, atol=bound)


def test_groups_of_a_model_are_used(dit: tuple[Any, Any]) -> None:
    model, opt = dit
    found = channel_rules(model, Counting(), FULL, steps=14, seeds=(0,), samples=2)
    assert len(found.groups) == 16
    assert set(found.groups) == set(range(len(found.rules)))
    opt.policy = Composition(14, Listed(FULL), (Rule(SkipBlocks(do=Anchors(found))),))
    sample(opt, 14, noise(2, (6, 10)))
    assert {r.kind.value for r in opt.steps} == {"full", "skip"}


def test_what_moves_alike_is_a_group() -> None:
    """Channels that stay, that rise evenly, that bend, and that jump: each kind has a rule that is right for it."""
    at = torch.arange(14.0)[:, None, None] * torch.ones(1, 6, 4)
    sizes = torch.rand(1, 6, 4) + 0.5
    jumps = torch.rand(14, 6, 4) * 0.3 + 1
    run = torch.cat([sizes + 0.001 * jumps, sizes * (1 + at), sizes * (1 + at**2), sizes * jumps], 2)
    found = rules_of(run, FULL, 3)
    chosen = [found.rules[group] for group in found.groups]
    assert not {Polynomial(1), Hermite()} & set(chosen[4:8])
    assert set(chosen[8:12]) == {Polynomial(3)}
    assert set(chosen[12:]) == {Polynomial(1)}


def test_what_does_not_fit_is_refused(dit: tuple[Any, Any]) -> None:
    _, opt = dit
    sample(opt, 1, noise(2, (6, 10)))  # once it is traced, the model's channels are known
    with pytest.raises(PolicyError, match="rules must give weights from the steps alone, not Dmd"):
        ByChannel((Dmd(),), (0,))
    with pytest.raises(PolicyError, match="groups must number one of 1 rules"):
        ByChannel((Polynomial(1),), (0, 1))
    for do in (Anchors(ByChannel()), SkipBlocks(do=Anchors(ByChannel()))):
        with pytest.raises(PolicyError, match="has 16 channels, and rules are told for 1"):
            opt.policy = Composition(14, Listed(FULL), (Rule(do),))


def test_another_rule_is_the_same_graph() -> None:
    other = ByChannel((Polynomial(2), Polynomial(1), Foca()), GROUPS)
    assert Ring(3, by=other).form() == Ring(3, by=BY).form()
    assert Ring(3, by=replace(other, groups=GROUPS[::-1])).form() != Ring(3, by=BY).form()
