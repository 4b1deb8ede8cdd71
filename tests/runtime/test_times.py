"""Times on an accelerator: where the host knows what the model is told, rows are kept by time as on the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.apart import apart, unread
from tests.models import PlainDiT, randomize
from tests.runs import TIMES, optimized
from tests.runtime.test_conditioning import LABELS, OTHERS, POLICY, made
from tests.sampling import noise
from tests.shared import Traced
from toca_compile.runtime.conditioning import TABLES


def sampled(model: Any, timesteps: Any, labels: Callable[[], Tensor] = lambda: LABELS) -> Tensor:
    """A sampling whose model is told the time as pipelines tell it."""
    x = noise()
    with torch.no_grad():
        for t in timesteps:
            x = x - 0.1 * model(x, t.expand(2).to(torch.bfloat16) * 0.5, labels())
    return x


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return sampled(randomize(PlainDiT()), torch.tensor(TIMES))


def times() -> Tensor:
    """The timesteps of a scheduler."""
    return torch.tensor(TIMES)


def same(a: Tensor, b: Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_the_loop_is_told_makes_all_rows_at_once(traced: Traced) -> None:
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    with apart():
        told = opt.begin(times())
        with unread(), made() as found:
            out = sampled(opt, told)
        assert found == ["rows"]
        assert opt._toca.session.control.conditioning_bytes > 0
    same(out, sampled(fresh, times()))


def test_times_that_the_host_does_not_know_are_not_read(traced: Traced) -> None:
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    with apart():
        opt.begin(times())
        with unread(), made() as found:
            out = sampled(opt, times())
        assert found == []
    same(out, sampled(fresh, times()))


def test_weights_that_change_between_two_samplings_are_used(expected: Tensor) -> None:
    """Also those that are written to behind torch's back: rows go with their run."""
    model = randomize(PlainDiT())
    opt = optimized(model, POLICY)
    with apart():
        sampled(opt, opt.begin(times()))
        model.blocks[1].modulation[1].weight.data.mul_(2)  # type: ignore[operator, union-attr, index]
        with made() as found:
            out = sampled(opt, opt.begin(times()))
        assert found == ["rows"]
    fresh = optimized(model, POLICY)
    same(out, sampled(fresh, times()))
    assert not torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_other_timesteps_than_were_announced(traced: Traced) -> None:
    """Who writes to the timesteps in mid-run is not given rows of what they were."""
    model, opt = traced(PlainDiT)

    def shifted(timesteps: Any) -> Any:
        for i in range(len(timesteps)):
            if i == 3:
                timesteps += 7
            yield timesteps[i]

    with apart():
        out = sampled(opt, shifted(opt.begin(times())))
    same(out, sampled(model, shifted(times())))


def test_labels_made_anew_at_each_step_do_not_make_all_rows_each_time(traced: Traced) -> None:
    """On an accelerator they cannot be told to be the same."""
    opt, fresh = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    with apart():
        told = opt.begin(times())
        with unread(), made() as found:
            out = sampled(opt, told, lambda: OTHERS.clone())
        assert found == [*["rows"] * TABLES, *["row"] * (8 - TABLES)]
    same(out, sampled(fresh, times(), lambda: OTHERS))


def test_a_call_in_which_the_host_knows_the_time_is_traced_apart_from_one_in_which_it_does_not(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    with apart():
        sampled(opt, opt.begin(times()))
        before = opt._toca.session.seen
        sampled(opt, times())
        sampled(opt, opt.begin(times()))
        assert opt._toca.session.seen <= before + 1


def test_where_a_sampling_begins_is_seen_though_the_time_lies_elsewhere(traced: Traced) -> None:
    """An abandoned sampling is told from its continuation."""
    _, opt = traced(PlainDiT, POLICY)
    told = None
    with apart():
        told = opt.begin(times())
        sampled(opt, told[:3])
        sampled(opt, told)
        assert [r.index for r in opt.steps] == list(range(8))
        assert opt._toca.session.control.time_is_visible


class Guided(nn.Module):
    """A model that is told a guidance scale as it is told the time."""

    def __init__(self) -> None:
        super().__init__()
        self.model = PlainDiT()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        x, c = self.model.prepare(x, t, y)
        c = c + guidance.sin()[:, None]
        for block in self.model.blocks:
            x = block(x, c)
        return self.model.finish(x, c)


def test_a_guidance_scale_elsewhere_stays_as_it_is() -> None:
    model = randomize(Guided())
    opt = optimized(model, POLICY)
    scale = torch.full((2,), 3.5)
    with apart():
        told = opt.begin(times())
        with unread(), made() as found:
            out = sampled(lambda x, t, y: opt(x, t, y, scale), told)
        assert found == ["rows"]
    fresh = optimized(model, POLICY)
    same(out, sampled(lambda x, t, y: fresh(x, t, y, scale), times()))
