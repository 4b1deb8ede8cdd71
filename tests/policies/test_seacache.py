"""SeaCache: values and decisions of its loop, whatever tells it the noise."""

from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests.models import PlainDiT, randomize
from tests.pipelines import build, run
from tests.policies.test_block_cache import close
from tests.policies.test_teacache import TeaCacheOracle
from tests.sampling import noise, sample
from toca_compile import FullCompute, PolicyError, load_policy, save_policy
from toca_compile.ir.signature import Signature
from toca_compile.ops.spectra import sea_filter
from toca_compile.policies import SeaCache

SIZE, STEPS = (6, 10), 16


def literal(h: Tensor, grid: tuple[int, ...], sigma: float, power: float) -> Tensor:
    """The filter on ``[batch, tokens, channels]``: the gain of each frequency by the formula, one by one."""
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    x = h.double().unflatten(1, grid)
    spectrum = torch.fft.fftn(x, dim=list(range(1, 1 + len(grid))))
    gain = torch.ones(grid, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid)).tolist():
        for i, n in zip(place, grid, strict=True):
            f = min(i, n - i) / n
            clean = 1 / (f**power + 1e-16)
            gain[tuple(place)] *= (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2 + 1e-16)
    gain = gain / gain.mean()
    back = torch.fft.ifftn(spectrum * gain[..., None], dim=list(range(1, 1 + len(grid))))
    return back.real.flatten(1, len(grid))


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("power", [2.0, 3.0])
def test_the_filter(sigma: float, power: float) -> None:
    h = torch.randn(2, 15, 4)
    scaled = round(sigma * 2**32)
    found = sea_filter(h, scaled, 1, 1, [1, 3, 5], 0, power)
    torch.testing.assert_close(found.double(), literal(h, (3, 5), sigma, power), rtol=1e-4, atol=1e-5)
    # Of tokens in two dimensions, and among others that are none of the picture's.
    assert torch.equal(sea_filter(h.unflatten(1, (3, 5)), scaled, 1, 2, [1, 3, 5], 0, power).flatten(1, 2), found)
    more = torch.cat([torch.randn(2, 2, 4), h, torch.randn(2, 3, 4)], 1)
    torch.testing.assert_close(sea_filter(more, scaled, 1, 1, [1, 3, 5], 2, power)[:, 2:17], found)
    video = torch.randn(2, 24, 4)
    torch.testing.assert_close(
        sea_filter(video, scaled, 1, 1, [2, 3, 4], 0, power).double(), literal(video, (2, 3, 4), sigma, power),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


class SeaCacheOracle(TeaCacheOracle):
    """TeaCache's loop on what is filtered."""

    def __init__(self, model: PlainDiT, threshold: float, power: float, sigmas: list[float]) -> None:
        super().__init__(model, STEPS, threshold, (1.0, 0.0))
        self.power, self.sigmas = power, sigmas

    def measured(self, modulated: Tensor) -> Tensor:
        return literal(modulated, self.model.grid, self.sigmas[self.call], self.power)


EVEN = [1 - i / STEPS for i in range(STEPS)]
BENT = [round((1 - i / STEPS) ** 2, 6) for i in range(STEPS)]


def test_equal_to_its_loop() -> None:
    model = randomize(PlainDiT(SIZE, depth=3))
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager")
    x, kinds = noise(2, SIZE), set()
    for threshold in (0.05, 0.15, 0.3):
        for power, sigmas in ((2.0, EVEN), (3.0, BENT)):
            own = () if sigmas is EVEN else tuple(sigmas)
            opt.policy = SeaCache(STEPS, threshold, power, own)
            oracle = SeaCacheOracle(model, threshold, power, sigmas)
            close(sample(opt, STEPS, x), sample(oracle, STEPS, x))
            assert [r.kind.value for r in opt.steps] == oracle.kinds
            kinds.add(tuple(oracle.kinds))
    assert len(kinds) > 3  # thresholds and noise decide


def test_the_noise_is_that_of_the_announced_times() -> None:
    policy = SeaCache(3, 0.2)
    assert policy.for_call(Signature(times=(1000.0, 500.0, 250.0))).sigmas == (1.0, 0.5, 0.25)
    assert policy.for_call(Signature(times=(1.0, 0.5, 0.25))).sigmas == (1.0, 0.5, 0.25)
    assert policy.for_call(Signature()) == policy
    own = SeaCache(2, 0.2, sigmas=(0.9, 0.1))
    assert own.for_call(Signature(times=(1.0, 0.5, 0.25))) == own


def test_in_a_pipeline_the_scheduler_says_it() -> None:
    pipe, call = build("FluxPipeline")
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    run(pipe, call, 8)
    sigmas = tuple(t / 1000 for t in pipe.scheduler.timesteps.tolist())
    other = []
    for threshold in (0.2, 0.4, 0.6, 0.9, 1.3):
        told = []
        for policy in (
            SeaCache(50, threshold),
            SeaCache(8, threshold, sigmas=sigmas),
            SeaCache(8, threshold, sigmas=(0.98,) * 8),
        ):
            pipe.transformer.policy = policy
            told.append((run(pipe, call, 8), [r.kind.value for r in pipe.transformer.steps]))
        assert torch.equal(told[0][0], told[1][0])
        assert told[0][1] == told[1][1]
        other.append(told[1][1] != told[2][1])
    assert any(other)  # what is said decides


def test_without_a_grid_it_is_refused() -> None:
    model, x = randomize(PlainDiT(SIZE, depth=2)), torch.randn(2, 15, 16)

    class OfTokens(torch.nn.Module):
        """The blocks alone, which know no picture."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks: Any = model.blocks

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, c)
            return x

    opt = toca_compile.optimize(OfTokens().eval(), SeaCache(4, 0.2), lowering="eager")
    with pytest.raises(PolicyError, match=r"height and width in tokens are not known.*grid="), torch.no_grad():
        opt(x, torch.randn(2, 16))


def test_as_a_file(tmp_path: Any) -> None:
    policy = SeaCache(4, 0.3, 3.0, (1.0, 0.7, 0.4, 0.1), limit=2, order=1)
    save_policy(policy, tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == policy
