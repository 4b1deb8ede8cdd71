"""FreqCa: the low band of what all blocks add is reused, and the high band forecast."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests import pipelines
from tests.oracles import anchors as literal
from tests.sampling import noise, sample, sample_flux
from toca_compile import FullCompute, PolicyError
from toca_compile.ops.spectra import with_low_band
from toca_compile.policies import Bands, Composition, Every, FreqCa, Rule


def low(h: Tensor, grid: Sequence[int], cutoff: float) -> Tensor:
    """What of ``[batch, tokens, channels]`` is low: the waves of the grid one by one."""
    x = h.double().unflatten(1, grid)
    dims = list(range(1, 1 + len(grid)))
    spectrum = torch.fft.fftn(x, dim=dims)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid)).tolist():
        shares = [min(i, n - i) / n / 0.5 for i, n in zip(place, grid, strict=True)]
        if max(shares) > cutoff:
            spectrum[(slice(None), *place)] = 0
    return torch.fft.ifftn(spectrum, dim=dims).real.flatten(1, len(grid))


@pytest.mark.parametrize("cutoff", [0.0, 0.5, 1.0])
def test_the_band(cutoff: float) -> None:
    forecast, last = torch.randn(2, 15, 4), torch.randn(2, 15, 4)
    wanted = forecast - low(forecast, (3, 5), cutoff) + low(last, (3, 5), cutoff)
    found = with_low_band(forecast, last, 1, 1, [1, 3, 5], 0, cutoff)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    apart = (2, 3, 5, 4)
    assert torch.equal(
        with_low_band(forecast.view(apart), last.view(apart), 1, 2, [1, 3, 5], 0, cutoff).flatten(1, 2), found
    )
    around = [torch.cat([torch.randn(2, 2, 4), x, torch.randn(2, 3, 4)], 1) for x in (forecast, last)]
    mixed = with_low_band(around[0], around[1], 1, 1, [1, 3, 5], 2, cutoff)
    torch.testing.assert_close(mixed[:, 2:17], found)
    assert torch.equal(mixed[:, :2], around[0][:, :2])
    assert torch.equal(mixed[:, 17:], around[0][:, 17:])
    video = torch.randn(2, 24, 4), torch.randn(2, 24, 4)
    wanted = video[0] - low(video[0], (2, 3, 4), cutoff) + low(video[1], (2, 3, 4), cutoff)
    torch.testing.assert_close(with_low_band(*video, 1, 1, [2, 3, 4], 0, cutoff).double(), wanted, rtol=1e-4, atol=1e-5)


def test_equal_to_its_literal_form(dit: tuple[Any, Any]) -> None:
    model, opt = dit
    x = noise(2, (6, 10), seed=3)
    seen = []
    for cutoff, scale, kept in ((0.0, 0.5, 3), (0.5, 0.7, 3), (1.0, 0.5, 2)):
        policy = FreqCa(14, 4, 2, cutoff, scale, kept)
        opt.policy = policy

        def predict(anchors: list[literal.Anchor], step: int, cutoff: float = cutoff, scale: float = scale) -> Tensor:
            high, last = literal.hicache(scale)(anchors, step), anchors[-1][1]
            return high - low(high, (3, 5), cutoff) + low(last, (3, 5), cutoff)

        oracle = literal.AnchorOracle(model, policy.full_steps(), kept, predict, blocks=True)
        seen.append(sample(oracle, 14, x))
        torch.testing.assert_close(sample(opt, 14, x), seen[-1], rtol=1e-4, atol=1e-4 * float(seen[-1].abs().max()))
        assert "".join(r.kind.value[0] for r in opt.steps) == "ffsssfsssfsssf"
    assert not torch.allclose(seen[0], seen[1], rtol=1e-2, atol=1e-2)


def test_a_joint_stream() -> None:
    """Text and picture in one stream, of which the grid is a part."""
    opt = toca_compile.optimize(pipelines.flux(), FullCompute(), lowering="eager")
    pictures = []
    for cutoff in (0.0, 0.5, 1.0):
        opt.policy = FreqCa(8, 3, cutoff=cutoff)
        pictures.append(sample_flux(opt, 8, 2, (3, 4)))
        assert {r.kind.value for r in opt.steps} == {"full", "skip"}
    for one, other in pairwise(pictures):
        assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_of_single_sites_it_is_refused(dit: tuple[Any, Any]) -> None:
    _, opt = dit
    with pytest.raises(PolicyError, match="bands are those of all blocks"):
        opt.policy = Composition(4, Every(2), (Rule(Bands()),))
