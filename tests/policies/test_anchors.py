"""Anchors: the published predictors as weights of kept values, equal to their literal forms, exact where they must be."""

import cmath
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toca_compile
from tests.models import PlainDiT, randomize
from tests.oracles import anchors as literal
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import Composition, PolicyError, TaylorSeer
from toca_compile.ir.anchors import AHEAD, Ring, Weights
from toca_compile.ir.history import Past
from toca_compile.ir.state import Number
from toca_compile.lowerings import inductor
from toca_compile.ops import dynamics, series
from toca_compile.policies import (
    Anchors,
    Chebyshev,
    Dmd,
    Every,
    Foca,
    Given,
    Hermite,
    Listed,
    Mixed,
    Partial,
    Polynomial,
    Rule,
    Share,
    SkipBlocks,
    Taylor,
)  # fmt: skip
from toca_compile.policies.storage import as_data, from_data


def given_row(step: int) -> tuple[float, ...]:
    """Some weights, of one, two or three values."""
    rows = ((1.0,), (-0.1 * step, 1 + 0.1 * step), (0.1, -0.1 * step, 0.9 + 0.1 * step))
    return rows[(step > 1) + (step > 4)]


def given_weights(anchors: Sequence[literal.Anchor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum, or the last value, where there are more or fewer than weights."""
    values = [h.double() for _, h in anchors]
    if len(values) != len(weights):
        return values[-1]
    return torch.stack([w * h for w, h in zip(weights, values, strict=True)]).sum(0)


PREDICTORS: list[tuple[Weights, Any]] = [
    (Polynomial(), literal.newton),
    (Taylor(), literal.taylor),
    (Hermite(0.5), literal.hicache(0.5)),
    (Hermite(0.9), literal.hicache(0.9)),
    (Foca(), literal.foca),
    (Chebyshev(4, 0.1, 14), literal.spectrum(4, 0.1, 14, 0.0)),
    (Chebyshev(3, 0.05, 14, local=0.5), literal.spectrum(3, 0.05, 14, 0.5)),
    (
        Given(tuple(given_row(step) for step in range(14))),
        lambda anchors, step: given_weights(anchors, given_row(step)),
    ),
    (Polynomial(last=2), lambda anchors, step: literal.newton(anchors[-2:], step)),
    (
        Mixed((Foca(), Polynomial(1)), tuple((i / 10, 1 - i / 10) for i in range(14))),
        lambda anchors, step: step / 10 * literal.foca(anchors, step) + (1 - step / 10) * anchors[-1][1].double(),
    ),
]
UNEVEN = (0, 1, 4, 6, 7, 11)


def composition(full: Sequence[int], do: Any, steps: int = 14, **fields: Any) -> Composition:
    return Composition(steps, Listed(tuple(full)), (Rule(do),), **fields)


@pytest.fixture
def small(traced: Traced) -> tuple[Any, Any]:
    """A model, and it optimised: traced once, under any policy."""
    return traced(PlainDiT, size=(4, 4), width=8, depth=2)


@pytest.mark.parametrize(("by", "predict"), PREDICTORS, ids=lambda p: repr(p) if isinstance(p, Weights) else "")
def test_equal_to_its_literal_form(small: tuple[Any, Any], by: Weights, predict: Any) -> None:
    """Of single sites and of the stack of blocks, at uneven gaps."""
    model, opt = small
    for kept, blocks in product((1, 3, 4), (False, True)):
        do = Anchors(by, kept)
        opt.policy = composition(UNEVEN, SkipBlocks(do=do) if blocks else do)
        oracle = literal.AnchorOracle(model, UNEVEN, kept, predict, blocks=blocks)
        same_run(opt, oracle, f"{kept} kept, {blocks=}")
        assert toca_compile.explain(opt).schedule == "".join(
            "F" if i in UNEVEN else "S" if blocks else "T" for i in range(14)
        )


def same_run(opt: Any, oracle: Any, what: str) -> torch.Tensor:
    """The run of an oracle, which is that of the optimised model."""
    x = noise(2, (4, 4), seed=3)
    expected = sample(oracle, 14, x)
    bound = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(sample(opt, 14, x), expected, rtol=1e-4, atol=bound, msg=lambda text: f"{what}: {text}")
    return expected


EVEN = (0, 3, 6, 9)


@pytest.mark.parametrize("full", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_measured_weights_equal_their_literal_form(small: tuple[Any, Any], full: tuple[int, ...]) -> None:
    model, opt = small
    for kept, blocks in product((2, 3, 4), (False, True)):
        do, ridge = Anchors(Dmd(1e-4), kept), 1e-4
        opt.policy = composition(full, SkipBlocks(do=do) if blocks else do)
        oracle = literal.AnchorOracle(model, full, kept, literal.dmd(ridge), blocks=blocks)
        expected = same_run(opt, oracle, f"{kept} kept, {blocks=}")
        reused = literal.AnchorOracle(model, full, kept, lambda anchors, step: anchors[-1][1], blocks=blocks)
        assert not torch.allclose(expected, sample(reused, 14, noise(2, (4, 4), seed=3)), rtol=1e-3, atol=1e-3)


def forecast(
    values: Sequence[torch.Tensor], full: Sequence[int], kept: int, ahead: Sequence[int]
) -> list[torch.Tensor]:
    """What the graphs do, on values of the full steps: forecasts so many steps after the last."""
    ring = Ring(kept, by=Dmd(1e-11))
    output, before = torch.zeros_like(values[0]), torch.zeros(kept - 1, *values[0].shape)
    past = Past()
    for at, value in zip(full, values, strict=True):
        numbers = ring.numbers(past, at, 0)
        place, even, gap = (numbers[Number.KEEP, i] for i in range(3))
        series.store_at_(before, place, output)
        output = value
        table = dynamics.dmd(dynamics.gram(output, before), place, even, gap, AHEAD, 1e-11)
        past = Past((*past.full, at)[-kept:], past.times + 1, 0)
    assert table.isfinite().all()
    rows = [dynamics.weights_at(table, ring.numbers(past, full[-1] + r, 0)[Number.MOVE, 0]) for r in ahead]
    kinds = (output, *before)
    return [torch.stack([dynamics.weighted_by(v, row, i) for i, v in enumerate(kinds)]).sum(0) for row in rows]


@given(st.data(), st.integers(2, 5), st.integers(1, 6), st.integers(0, 3), st.integers(1, 3))
def test_a_sum_of_exponentials_goes_on(data: st.DataObject, kept: int, gap: int, more: int, seed: int) -> None:
    """Fewer of them than values are kept, each by itself or in a pair that turns, at any step after the last."""
    count, turns = data.draw(st.integers(1, kept - 1)), data.draw(st.booleans())
    # Apart, so that single precision can tell them apart.
    sizes = [1.05 - 0.3 * i - data.draw(st.floats(0, 0.1)) for i in range(count)]
    angle = data.draw(st.floats(0.4, 1.2)) if turns and count > 1 else 0.0  # of the first two, a pair
    factors = [size * cmath.exp(1j * angle * (i == 0)) for i, size in enumerate(sizes) if not (angle and i == 1)]
    full = [gap * i for i in range(kept + more)]
    r = torch.Generator().manual_seed(seed)
    # Modes that are at right angles to each other; a pair's are the real and the imaginary part of one.
    modes = torch.linalg.qr(torch.randn(40, count, generator=r, dtype=torch.float64))[0]

    def value(step: float) -> torch.Tensor:
        total, used = torch.zeros(40, dtype=torch.float64), 0
        for f in factors:
            at = f ** ((step - full[-kept]) / gap)
            total, used = total + at.real * modes[:, used], used + 1
            if f.imag:
                total, used = total + at.imag * modes[:, used], used + 1
        return total.float()

    ahead = range(1, gap + 2)
    for r_, told_ in zip(ahead, forecast([value(s) for s in full], full, kept, ahead), strict=True):
        torch.testing.assert_close(
            told_, value(full[-1] + r_), rtol=0, atol=1e-4 * float(value(full[-kept]).abs().max())
        )


@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0, 1e-30], ids=["constant", "zero", "alternating", "vanishing"])
@pytest.mark.parametrize("full", [(4,), (0, 3, 6, 9), (0, 1, 5), (0, 40)], ids=["one", "even", "uneven", "far"])
def test_what_cannot_be_told_is_repeated(full: tuple[int, ...], factor: float) -> None:
    """Values of which one follows from another, single ones, none at all: the last one, and not what no number is."""
    values = [factor**i * torch.arange(1.0, 21) for i in range(len(full))]
    for told_ in forecast(values, full, 4, range(1, 70, 4)):
        if factor != 1e-30:
            torch.testing.assert_close(told_, values[-1], rtol=1e-4, atol=1e-6)
        else:
            assert told_.isfinite().all()


@pytest.mark.inductor
def test_no_recompile_for_measured_weights() -> None:
    """The table is made and read by one variant each."""
    models = [randomize(PlainDiT((4, 4), width=8, depth=2)) for _ in range(2)]
    policy = composition(UNEVEN, Anchors(Dmd(1e-4), 3))
    opt = toca_compile.optimize(models[0], policy)
    x = noise(1, (4, 4))
    sample(opt, 6, x)
    before = inductor.compiles
    result = sample(opt, 14, x)
    opt.policy = composition(EVEN, Anchors(Dmd(1e-4), 3))
    sample(opt, 14, x)
    assert inductor.compiles == before
    eager = toca_compile.optimize(models[1], policy, lowering="eager")
    torch.testing.assert_close(result, sample(eager, 14, x), rtol=1e-3, atol=1e-3)


def test_measured_weights_stay_on_the_device() -> None:
    """On meta tensors there is no value to read: a step that asked for one would fail."""
    with torch.device("meta"):
        ghost = PlainDiT((4, 4), width=8, depth=2).eval()
        inputs = noise(1, (4, 4)).to("meta"), torch.empty(1), torch.empty(1, dtype=torch.long)
    for do in (Anchors(Dmd(), 3), SkipBlocks(do=Anchors(Dmd(), 3))):
        opt = toca_compile.optimize(ghost, composition(EVEN, do), lowering="eager")
        with torch.no_grad():
            for _ in range(14):
                assert opt(*inputs).shape == inputs[0].shape


def told(ring: Ring, values: torch.Tensor, full: Sequence[int], step: int) -> torch.Tensor:
    """What the graphs do, on one number: the ring written at each full step, the sum at ``step``."""
    output, kept = torch.zeros(()), torch.zeros(max(ring.kept - 1, 1))
    past = Past()
    for at in full:
        numbers = ring.numbers(past, at, 0)
        if ring.kept > 1:
            series.store_at_(kept, numbers[Number.KEEP, 0], output)
        output = values[at].clone()
        past = Past((*past.full, at)[-ring.kept :], past.times + 1, 0)
    numbers = ring.numbers(past, step, 0)
    total = series.weighted(output, numbers[Number.MOVE, 0])
    return total + sum(series.weighted(kept[i], numbers[Number.MOVE, i + 1]) for i in range(ring.kept - 1))


@given(st.data(), st.integers(1, 5))
def test_a_polynomial_is_exact_below_the_number_of_anchors(data: st.DataObject, kept: int) -> None:
    """However they are spaced, and however many were before them."""
    gaps = data.draw(st.lists(st.integers(1, 6), min_size=kept - 1, max_size=kept + 4))
    full = [0]
    for gap in gaps:
        full.append(full[-1] + gap)
    step = full[-1] + data.draw(st.integers(1, 6))
    coefficients = data.draw(st.lists(st.integers(-5, 5), min_size=1, max_size=kept))
    x = torch.arange(step + 1, dtype=torch.float64) / 8
    values = sum((c * x**i for i, c in enumerate(coefficients)), start=torch.zeros_like(x)).float()
    actual = told(Ring(kept, by=Polynomial()), values, full, step)
    torch.testing.assert_close(actual, values[step], rtol=1e-3, atol=1e-2)


@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=4), st.integers(1, 6), st.sampled_from([p for p, _ in PREDICTORS])
)
def test_weights_of_a_constant_sum_to_one(gaps: list[int], ahead: int, by: Weights) -> None:
    """What never changes is forecast as it is; a ridge shrinks it a little."""
    full = [0]
    for gap in gaps:
        full.append(full[-1] + gap)
    weights = by.weights(full, full[-1] + ahead)
    assert len(weights) == len(full)
    if not isinstance(by, Chebyshev):
        assert sum(weights) == pytest.approx(1.0, abs=1e-6)


def test_newton_and_taylor_are_what_differences_make_of_them(small: tuple[Any, Any]) -> None:
    (_, opt), x = small, noise(2, (4, 4))
    for basis, by in (("newton", Polynomial()), ("taylor", Taylor())):
        results = []
        for policy in (TaylorSeer(14, order=2, full=UNEVEN, basis=basis), composition(UNEVEN, Anchors(by, 3))):
            opt.policy = policy
            results.append(sample(opt, 14, x))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_the_last_values(traced: Traced) -> None:
    sizes, (_, opt) = [], traced(PlainDiT)
    for kept in (1, 3):
        opt.policy = composition((0, 4), Anchors(Polynomial(), kept), 8)
        sample(opt, 7, noise())
        sizes.append(opt.cache_bytes)
        assert toca_compile.explain(opt).cache_bytes == opt.cache_bytes
    assert sizes[1] == 3 * sizes[0]


@pytest.mark.inductor
def test_no_recompile_for_other_weights() -> None:
    """One variant for all weights, steps and rules."""
    opt = toca_compile.optimize(
        randomize(PlainDiT((4, 4), width=8, depth=2)), composition(UNEVEN, Anchors(Polynomial(), 3))
    )
    x = noise(1, (4, 4))
    sample(opt, 6, x)
    before = inductor.compiles
    sample(opt, 14, x)
    for by in (Hermite(0.7), Foca(), Chebyshev(num_steps=14)):
        opt.policy = composition(UNEVEN, Anchors(by, 3))
        result = sample(opt, 14, x)
        assert inductor.compiles == before
    eager = toca_compile.optimize(
        randomize(PlainDiT((4, 4), width=8, depth=2)), composition(UNEVEN, Anchors(by, 3)), lowering="eager"
    )
    torch.testing.assert_close(result, sample(eager, 14, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Anchors(Polynomial(), 0), "kept"),
        (lambda: Anchors("newton"), "by"),
        (lambda: Hermite(0.0), "scale"),
        (lambda: Dmd(0.0), "ridge"),
        (lambda: SkipBlocks(order=1, do=Anchors(Polynomial())), "without order"),
        (lambda: SkipBlocks(do=Partial()), "reuses or forecasts"),
    ],
)
def test_nonsense_is_refused(make: Any, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make()


def test_tokens_with_a_history_of_their_own_cannot_be_anchors() -> None:
    policy = Composition(
        8, Every(4), (Rule(Partial(), kinds=("mlp",), depths=(0.0, 1.0)), Rule(Anchors(Polynomial()))),
        alternate=(Rule(Anchors(Polynomial())),), how_many=Share(0.5),
    )  # fmt: skip
    opt = toca_compile.optimize(randomize(PlainDiT()), policy, lowering="eager")
    with pytest.raises(PolicyError, match="one by one"):
        sample(opt, 8, noise())


def test_a_file_holds_them_and_a_run_sets_its_steps() -> None:
    policy = composition((0, 4), SkipBlocks(do=Anchors(Chebyshev(num_steps=50), 6)), 8)
    assert from_data(as_data(policy)) == policy
    measured = composition((0, 4), Anchors(Dmd(1e-6), 6), 8)
    assert from_data(as_data(measured)) == measured
    (rule,) = policy.for_run(30, True).rules
    assert rule.do == SkipBlocks(do=Anchors(Chebyshev(num_steps=30), 6))
