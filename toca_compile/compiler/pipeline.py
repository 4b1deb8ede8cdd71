"""The passes in order. Each needs what the one before it found."""

from dataclasses import replace

from torch import fx

import toca_compile.rules  # noqa: F401  (fills the table of rules)
from toca_compile.compiler.layouts import lay_out
from toca_compile.ir.factors import Factors
from toca_compile.ir.program import Pass, Program
from toca_compile.ir.types import AxisTypes
from toca_compile.passes import capture as _capture
from toca_compile.passes import find_attention as _find_attention
from toca_compile.passes import find_clock as _find_clock
from toca_compile.passes import find_scores as _find_scores
from toca_compile.passes import find_sites as _find_sites
from toca_compile.passes import hoist as _hoist
from toca_compile.passes import infer_axes as _infer_axes
from toca_compile.passes import outline as _outline
from toca_compile.passes.proof.written import check_written


def capture(program: Program) -> Program:
    """Dynamo's graph to functional ATen."""
    writable = [program.fragment and not fixed for fixed in program.static_inputs]
    module, written = _capture.capture(program.module, program.inputs, writable)
    return replace(program, module=module, inputs=(), written=written)


def infer_axes(program: Program) -> Program:
    """A type for every value."""
    return replace(program, types=_infer_axes.infer_axes(program.module.graph, AxisTypes(Factors())))


def find_attention(program: Program) -> Program:
    """Where queries read keys: this defines the token axes."""
    assert program.types is not None
    return replace(program, attentions=_find_attention.find_attention(program.module.graph, program.types))


def find_sites(program: Program) -> Program:
    """Residual branches on those axes, with what each may do."""
    assert program.types is not None
    static = static_nodes(program)
    sites = _find_sites.find_sites(
        program.module.graph, program.types, program.attentions, static, program.grid, fragment=program.fragment
    )
    check_written(program.module.graph, sites, program.writes)
    return replace(program, sites=lay_out(sites, program.types.factors, program.layouts))


def outline(program: Program) -> Program:
    """Blocks that are the same graph become one template."""
    segments, sites = _outline.outline(program.module.graph, program.sites)
    return replace(program, segments=segments, sites=sites)


def find_scores(program: Program) -> Program:
    """Whose attention ranks each site's tokens."""
    assert program.types is not None
    return replace(program, sites=_find_scores.find_scores(program.sites, program.types))


def find_clock(program: Program) -> Program:
    """The inputs that tell the timestep: those whose numbers the host knows, if there are any."""
    assert program.types is not None
    clock, on_host = _find_clock.find_clock(program.varying, program.types, program.sites), program.on_host
    return replace(program, clock=tuple(n for n in clock if n in on_host) or clock)


def hoist(program: Program) -> Program:
    """What does not change during a run, or follows from the timestep beside it, stands first, to be computed once."""
    assert program.types is not None
    varying, on_host = frozenset(program.varying), program.on_host
    clock = {n: n in on_host for n in program.clock}
    graph, types = program.module.graph, program.types
    return replace(program, segments=_hoist.hoist(graph, program.segments, program.sites, types, varying, clock))


def static_nodes(program: Program) -> frozenset[fx.Node]:
    """Nodes that depend on parameters and constants only, so never on the step."""
    varying, static = set(program.varying), set()
    for node in program.module.graph.nodes:
        if node not in varying and not any(i not in static for i in node.all_input_nodes):
            static.add(node)
    return frozenset(static)


PIPELINE = tuple(
    Pass(step) for step in (capture, infer_axes, find_attention, find_sites, outline, find_scores, find_clock, hoist)
)
