"""The emissions of actions that compute all of a branch, or nothing of it."""

from typing import Protocol

import torch
from torch import fx

from toca_compile.ir.actions import Compute, Forecast, Reuse
from toca_compile.ir.program import Form
from toca_compile.ir.state import State
from toca_compile.ir.types import Site
from toca_compile.passes.variants.emit import Emissions, SegmentBuilder
from toca_compile.passes.variants.restrict import place
from toca_compile.passes.variants.select import selection_of
from toca_compile.passes.variants.series import Series, series_of

toca = torch.ops.toca
aten = torch.ops.aten


class Emission(Protocol):
    """Puts the value of a site's output into the graph's environment, and whatever the step must keep of it."""

    def __call__(self, builder: SegmentBuilder, position: int, site: Site, form: Form) -> None: ...


EMISSIONS: Emissions[Emission] = Emissions()


def site_series(builder: SegmentBuilder, position: int, site: Site, form: Form) -> Series:
    """The series of a site's output."""
    return series_of(builder, position, form.keep.history, places(site) if form.keep.by_token else None)


def places(site: Site) -> tuple[int, ...]:
    """Where the tokens and the batch lie in the site's output."""
    proof = site.row_proof or site.query_proof
    assert proof is not None
    return place(proof, site.output)


@EMISSIONS.of(Compute)
def compute(builder: SegmentBuilder, position: int, site: Site, form: Form) -> None:
    """The model's own op, kept: first what tokens are selected by, which may ask what was kept before."""
    builder.env[site.output] = builder.copy(site.output)
    if form.keep.score:
        slots = [builder.slot(State.SCORE, position, i) for i in range(form.keep.score)]
        selection = selection_of(builder, position, site)
        for slot, value in zip(slots, selection.measure(lambda: _expected(builder, position, site, form)), strict=True):
            builder.call(toca.store_.default, slot, selection.agreed(value))
    if form.keep.history is not None:
        series = site_series(builder, position, site, form)
        assert isinstance(form.action, Compute)
        series.keep(builder.env[site.output], moving=form.action.order > 0, age=series.age())


@EMISSIONS.of(Reuse)
def reuse(builder: SegmentBuilder, position: int, site: Site, form: Form) -> None:
    """The buffer itself."""
    kept = builder.slot(State.OUTPUT, position)
    builder.env[site.output] = builder.as_made(site.output, kept, position)


@EMISSIONS.of(Forecast)
def forecast(builder: SegmentBuilder, position: int, site: Site, form: Form) -> None:
    """What the series says."""
    series = site_series(builder, position, site, form)
    builder.env[site.output] = builder.cast(series.forecast(series.age()), site.output)


def _expected(builder: SegmentBuilder, position: int, site: Site, form: Form) -> fx.Node:
    """The forecast of a site's output, before anything of the step is kept."""
    series = site_series(builder, position, site, form)
    return series.forecast(series.age())
