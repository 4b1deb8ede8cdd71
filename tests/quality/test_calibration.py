"""``least_squares``: no other weights are nearer to what the blocks add. ``magnitudes`` is tested with MagCache."""

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.policies.test_magcache import Added
from tests.quality.test_evaluation import SIZE, Counting
from tests.sampling import noise, sample
from toca_compile import Composition, PolicyError
from toca_compile.policies import Anchors, Listed, Rule, SkipBlocks
from toca_compile.quality.calibration import least_squares

STEPS, FULL = 8, (0, 1, 4, 6)


def test_the_weights_are_those_of_least_squares() -> None:
    model = randomize(PlainDiT(SIZE, depth=2))
    added = Added(model)
    Counting()(added, STEPS, 0, 2)
    found = least_squares(model, Counting(), FULL, kept=2, steps=STEPS, seeds=(0,), samples=2)
    assert [len(row) for row in found.rows] == [0, 0, 2, 2, 0, 2, 0, 2]
    values = [v.double().flatten() for v in added.values]
    for step, row in enumerate(found.rows):
        if row:
            anchors = torch.stack([values[f] for f in FULL if f < step][-2:], 1)
            wanted = torch.linalg.lstsq(anchors, values[step]).solution
            assert row == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-4)
    torch._dynamo.reset()
    policy = Composition(STEPS, Listed(FULL), (Rule(SkipBlocks(do=Anchors(found, 2))),))
    opt = toca_compile.optimize(model, policy, lowering="eager")
    sample(opt, STEPS, noise(2, SIZE))
    assert [s.index for s in opt.steps if s.kind.value == "full"] == list(FULL)
    with pytest.raises(PolicyError, match="weights for 8 steps do not fit a run of 9"):
        policy.for_run(9, guided=False)
