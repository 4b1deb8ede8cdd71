"""Conditioning: what follows from the time is made once, kept by time, and made anew when what it is made from changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.recording import counting_products
from tests.runs import TIMES, optimized, steps
from tests.sampling import noise
from tests.shared import Traced
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer
from toca_compile.runtime import conditioning
from toca_compile.runtime.conditioning import Conditioning

LABELS, OTHERS = torch.tensor([1, 2]), torch.tensor([3, 4])
POLICY = Fora(8, 4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(PlainDiT())


@contextmanager
def made() -> Iterator[list[str]]:
    """What is made inside: a row, or rows of several times at once."""
    found: list[str] = []
    row, rows = Conditioning._make, Conditioning._make_rows

    def one(self: Any, *args: Any) -> Any:
        found.append("row")
        return row(self, *args)

    def many(self: Any, table: Any, *args: Any) -> Any:
        rows(self, table, *args)
        found.extend(["rows"] if table.rows else [])

    with patch.object(Conditioning, "_make", one), patch.object(Conditioning, "_make_rows", many):
        yield found


def test_a_second_sampling_makes_nothing_anew(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    with made() as first:
        a = steps(opt, noise(), TIMES, LABELS)
    with made() as second:
        b = steps(opt, noise(), TIMES, LABELS)
    assert first == ["row"] * 8
    assert second == []
    assert torch.equal(a, b)


def test_a_full_step_is_the_model_to_the_last_bit(traced: Traced) -> None:
    model, opt = traced(PlainDiT)
    assert torch.equal(steps(opt, noise(), TIMES, LABELS), steps(model, noise(), TIMES, LABELS))
    assert torch.equal(steps(opt, noise(seed=9), TIMES, LABELS), steps(model, noise(seed=9), TIMES, LABELS))


@pytest.mark.parametrize("policy", [FullCompute(), POLICY, TaylorSeer(8, 3, 1), BlockCache(8, 0, interval=3)], ids=str)
def test_other_labels_make_all_rows_at_once(traced: Traced, policy: Any) -> None:
    opt, fresh = (traced(PlainDiT, policy, which=i)[1] for i in range(2))
    steps(opt, noise(), TIMES, LABELS)
    with made() as found:
        out = steps(opt, noise(), TIMES, OTHERS)
    assert found == ["rows"]
    torch.testing.assert_close(out, steps(fresh, noise(), TIMES, OTHERS), rtol=1e-6, atol=1e-6)


def test_other_times_are_rows_of_their_own(traced: Traced) -> None:
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    steps(opt, noise(), TIMES, LABELS)
    times = [t + 3 for t in TIMES]
    with made() as found:
        out = steps(opt, noise(), times, LABELS)
    assert found == ["row"] * 8
    assert torch.equal(out, steps(fresh, noise(), times, LABELS))


def test_labels_in_turns_keep_their_rows(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    for labels in (LABELS, OTHERS):
        steps(opt, noise(), TIMES, labels)
    with made() as found:
        for labels in (LABELS, OTHERS, LABELS.clone()):  # equal labels are the same
            steps(opt, noise(), TIMES, labels)
    assert found == []


def _behind_the_counter(p: nn.Parameter) -> None:
    p.data.mul_(2)


def _in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(2)


def _replaced(p: nn.Parameter) -> None:
    p.data = p.data * 2


@pytest.mark.parametrize("way", [_behind_the_counter, _in_place, _replaced])
def test_changed_weights_are_used_from_the_next_full_step_on(way: Callable[[nn.Parameter], None]) -> None:
    model = randomize(PlainDiT())
    opt = optimized(model, POLICY)
    steps(opt, noise(), TIMES, LABELS)
    x, t = noise(), torch.full((2,), TIMES[4])
    with torch.no_grad():
        for time in TIMES[:2]:
            opt(x, torch.full((2,), time), LABELS)
        way(model.blocks[1].modulation[1].weight)  # type: ignore[arg-type, union-attr, index]
        for time in TIMES[2:4]:
            opt(x, torch.full((2,), time), LABELS)
        torch.testing.assert_close(opt(x, t, LABELS), model(x, t, LABELS), rtol=1e-6, atol=1e-6)


def test_what_a_step_skips_is_not_conditioned(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first sampling, when rows are made: what of them nothing reads is left out."""
    counted = counting_products(monkeypatch)
    opt = toca_compile.optimize(model, BlockCache(8, 0, interval=8), lowering="counting")
    steps(opt, noise(), TIMES[:1], LABELS)
    counted.clear()
    steps(opt, noise(), TIMES[1:2], LABELS)
    assert [r.kind for r in opt.steps] == ["full", "skip"]
    assert toca_compile.explain(opt).flops("skip", counting="torch") == sum(counted) > 0


def test_rows_beyond_the_limit_are_made_at_each_step(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized(model, POLICY)
    expected = steps(opt, noise(), TIMES, LABELS)
    (tables,) = opt._toca.session.control.tables.values()
    opt.reset()
    monkeypatch.setattr(conditioning, "LIMIT", tables[0].bytes // 2)
    for _ in range(2):
        assert torch.equal(steps(opt, noise(), TIMES, LABELS), expected)
    (tables,) = opt._toca.session.control.tables.values()
    assert 0 < tables[0].bytes <= conditioning.LIMIT


def test_where_times_are_known_rows_beyond_the_limit_take_the_place_of_others(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    opt.begin(TIMES)
    expected = steps(opt, noise(), TIMES, LABELS)
    (tables,) = opt._toca.session.control.tables.values()
    opt.reset()
    monkeypatch.setattr(conditioning, "LIMIT", 3 * tables[0].bytes // 8)
    opt.begin(TIMES)
    with made() as found:
        out = steps(opt, noise(), TIMES, LABELS)
    assert found == ["rows"] * 3
    (tables,) = opt._toca.session.control.tables.values()
    assert 0 < tables[0].bytes <= conditioning.LIMIT
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, steps(fresh, noise(), TIMES, LABELS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [list, torch.tensor, iter, lambda t: [1000, *t]])
def test_announced_times_make_all_rows_at_once(traced: Traced, given: Callable[[list[int]], Any]) -> None:
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    opt.begin(given(TIMES))
    with made() as found:
        out = steps(opt, noise(), TIMES, LABELS)
    assert found == ["rows"]
    torch.testing.assert_close(out, steps(fresh, noise(), TIMES, LABELS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("told", "rows"),
    [(lambda t: t / 1000, 1), (lambda t: 1 - t / 1000, 1), (lambda t: (t / 1000).to(torch.bfloat16), 1), (torch.sqrt, 0)],
)  # fmt: skip
def test_the_form_in_which_a_model_is_told_the_time_is_recognised(
    traced: Traced, told: Callable[[Tensor], Tensor], rows: int
) -> None:
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))

    def sampled(opt: Any) -> Tensor:
        x = noise()
        with torch.no_grad():
            for time in TIMES:
                x = x - 0.1 * opt(x, told(torch.full((2,), float(time))), LABELS)
        return x

    opt.begin(TIMES)
    with made() as found:
        out = sampled(opt)
    assert found.count("rows") == rows
    assert found.count("row") == (0 if rows else 8)
    torch.testing.assert_close(out, sampled(fresh), rtol=1e-6, atol=1e-6)


def test_times_that_do_not_come_are_made_as_they_come(traced: Traced) -> None:
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    opt.begin([TIMES[0], *(t + 1 for t in TIMES[1:])])
    with made() as found:
        out = steps(opt, noise(), TIMES, LABELS)
    assert found == ["rows", *["row"] * 7]
    torch.testing.assert_close(out, steps(fresh, noise(), TIMES, LABELS), rtol=1e-6, atol=1e-6)


def test_begin_begins_a_sampling_and_wants_numbers(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    steps(opt, noise(), TIMES[:3], LABELS)
    opt.begin(TIMES[2:])
    steps(opt, noise(), TIMES[2:4], LABELS)
    assert [r.index for r in opt.steps] == [0, 1]
    with pytest.raises(toca_compile.TocaError, match="timesteps must be numbers"):
        opt.begin(["first", "second"])


def test_more_times_than_are_made_at_once(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditioning, "_AT_ONCE", 3)
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    opt.begin(TIMES)
    with made() as found:
        out = steps(opt, noise(), TIMES, LABELS)
    assert found == ["rows"]
    torch.testing.assert_close(out, steps(fresh, noise(), TIMES, LABELS), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_made_for_several_times_is_made_one_by_one(model: nn.Module) -> None:
    opt, fresh = optimized(model, POLICY), optimized(model, POLICY)
    steps(opt, noise(), TIMES, LABELS)
    with patch("torch.func.vmap", side_effect=RuntimeError("no batching rule")), made() as found:
        out = steps(opt, noise(), TIMES, OTHERS)
    assert found == ["row"] * 8
    assert torch.equal(out, steps(fresh, noise(), TIMES, OTHERS))


def test_reset_forgets_the_rows(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    steps(opt, noise(), TIMES, LABELS)
    opt.reset()
    with made() as found:
        steps(opt, noise(), TIMES, LABELS)
    assert found == ["row"] * 8


def test_who_writes_to_the_inputs_does_not_write_to_the_rows(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    x, t, y = noise(), torch.full((2,), 500), LABELS.clone()
    with torch.no_grad():
        first = opt(x, t, y)
        t.fill_(400)
        y.copy_(OTHERS)
        opt(x, t, y)
        opt.reset()
        torch.testing.assert_close(opt(x, torch.full((2,), 500), LABELS), first, rtol=0, atol=0)


def test_samplings_in_inference_mode_share_rows_too(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    with torch.inference_mode(), made() as found:
        for _ in range(2):
            steps(opt, noise(), TIMES, torch.tensor([1, 2]))
    assert found == ["row"] * 8


class Noted(nn.Module):
    """A model that also returns its conditioning, to which its caller writes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = PlainDiT()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, c = self.model.prepare(x, t, y)
        for block in self.model.blocks:
            x = block(x, c)
        return self.model.finish(x, c), c


def test_what_is_handed_out_is_not_what_is_kept() -> None:
    model = randomize(Noted())
    opt = optimized(model, POLICY)
    with torch.no_grad():
        for _ in range(2):
            for time in TIMES:
                out, c = opt(noise(), torch.full((2,), time), LABELS)
                if time == TIMES[0]:
                    expected, told = model(noise(), torch.full((2,), time), LABELS)
                    assert torch.equal(out, expected)
                    assert torch.equal(c, told)
                c.zero_()
