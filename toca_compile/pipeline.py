"""The passes in order. Each needs what the one before it found."""

from dataclasses import replace

from torch import fx

import toca_compile.rules  # noqa: F401  (fills the table of rules)
from toca_compile.ir.factors import Factors
from toca_compile.ir.program import Pass, Unit
from toca_compile.ir.types import AxisTypes
from toca_compile.passes import capture as _capture
from toca_compile.passes import find_attention as _find_attention
from toca_compile.passes import find_clock as _find_clock
from toca_compile.passes import find_scores as _find_scores
from toca_compile.passes import find_sites as _find_sites
from toca_compile.passes import hoist as _hoist
from toca_compile.passes import infer_axes as _infer_axes
from toca_compile.passes import outline as _outline


def capture(unit: Unit) -> Unit:
    """Dynamo's graph to functional ATen."""
    return replace(unit, module=_capture.capture(unit.module, unit.inputs), inputs=())


def infer_axes(unit: Unit) -> Unit:
    """A type for every value."""
    return replace(unit, types=_infer_axes.infer_axes(unit.module.graph, AxisTypes(Factors())))


def find_attention(unit: Unit) -> Unit:
    """Where queries read keys: this defines the token axes."""
    assert unit.types is not None
    return replace(unit, attentions=_find_attention.find_attention(unit.module.graph, unit.types))


def find_sites(unit: Unit) -> Unit:
    """Residual branches on those axes, with what each may do."""
    assert unit.types is not None
    static = static_nodes(unit)
    sites = _find_sites.find_sites(unit.module.graph, unit.types, unit.attentions, static, unit.grid)
    return replace(unit, sites=sites)


def outline(unit: Unit) -> Unit:
    """Blocks that are the same graph become one template."""
    segments, sites = _outline.outline(unit.module.graph, unit.sites)
    return replace(unit, segments=segments, sites=sites)


def find_scores(unit: Unit) -> Unit:
    """Whose attention ranks each site's tokens."""
    assert unit.types is not None
    return replace(unit, sites=_find_scores.find_scores(unit.sites, unit.types))


def find_clock(unit: Unit) -> Unit:
    """The inputs that tell the timestep."""
    assert unit.types is not None
    return replace(unit, clock=_find_clock.find_clock(unit.varying, unit.types, unit.sites))


def hoist(unit: Unit) -> Unit:
    """What does not change during a run stands first, to be computed once."""
    varying, clock = frozenset(unit.varying), frozenset(unit.clock)
    return replace(unit, segments=_hoist.hoist(unit.module.graph, unit.segments, unit.sites, varying, clock))


def static_nodes(unit: Unit) -> frozenset[fx.Node]:
    """Nodes that depend on parameters and constants only, so never on the step."""
    varying, static = set(unit.varying), set()
    for node in unit.module.graph.nodes:
        if node not in varying and not any(i not in static for i in node.all_input_nodes):
            static.add(node)
    return frozenset(static)


PIPELINE = tuple(
    Pass(step) for step in (capture, infer_axes, find_attention, find_sites, outline, find_scores, find_clock, hoist)
)
