"""The text of a program with all that the passes so far found. One function a fact.

It begins with the finding of the last pass in one line. Each pass then has a section, and the graph is printed with
what is known of its values::

    // find-sites: 2 residual branches: 1 mlp, 1 self_attention

    sites
      0  blocks.0.attn  self_attention on image (h w), 4×4
         add -> linear_2 -> add_1
    …
    linear_2 = linear(view, arg3_1, arg4_1)          : f32[2, 16, 8] [b, (h w), c]  // blocks.0.attn, its output
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from toca_compile.ir.actions import legal_actions
from toca_compile.ir.graph import value_of
from toca_compile.ir.names import Names
from toca_compile.ir.printer import print_call, print_line, print_value, several, wrapped
from toca_compile.ir.program import Program, Segment
from toca_compile.ir.types import ScoreSource, Site


def print_program(program: Program, passes: Sequence[str]) -> str:
    """What is known after ``passes``, the names of those that ran, the last one's finding first."""
    names = Names(program) if program.types is not None else None
    text = [f"// {passes[-1]}: {summary(program, passes[-1])}"] if passes else []
    for name in passes:
        lines = FINDINGS[name].lines(program, names) if name in FINDINGS and names is not None else []
        if lines:
            text += ["", FINDINGS[name].title, *(f"  {line}" for line in lines)]
    return "\n".join([*text, "", *_graph(program, names)])


def summary(program: Program, name: str) -> str:
    """What a pass found, in a few words."""
    return FINDINGS[name].summary(program) if name in FINDINGS else "no account of what it found"


# -- findings: one function a fact ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What a pass adds to a program, as text: the section's title, a summary in a few words, and its lines."""

    title: str
    summary: Callable[[Program], str]
    lines: Callable[[Program, Names], list[str]]


def _captured(program: Program) -> str:
    calls = sum(n.op == "call_function" for n in program.module.graph.nodes)
    count = len(program.varying)
    return f"{calls} functional ATen calls, {_count(count, 'input')}, {len(program.placeholders) - count} parameters"


def _typed(program: Program) -> str:
    assert program.types is not None
    unknown = len(program.types.unknown)
    return f"{Names(program).count} index spaces; " + (
        f"no rule for {_count(unknown, 'call')}" if unknown else "every call has a rule"
    )


def _axes(program: Program, names: Names) -> list[str]:
    unknown = [f"nothing is known of {node.name}: {why}" for node, why in names.types.unknown.items()]
    return wrapped(names.legend()) + unknown


def _attended(program: Program) -> str:
    return _count(len(program.attentions), "attention")


def _attentions(program: Program, names: Names) -> list[str]:
    lines = []
    for attention in program.attentions:
        lead = f", for each {names.dim(attention.lead)}" if attention.lead else ""
        written = f", written out: its map is {attention.map.name}" if attention.map is not None else ""
        lines.append(
            f"{attention.node.name}: queries {names.dim(attention.axis)} read keys {names.dim(attention.key_axis)}"
            f"{lead}{written}"
        )
    return lines


def _branches(program: Program) -> str:
    kinds = sorted(Counter(s.kind for s in program.sites).items())
    told = ": " + ", ".join(f"{n} {kind}" for kind, n in kinds) if kinds else ""
    return f"{_count(len(program.sites), 'residual branch', 'residual branches')}{told}"


def _sites(program: Program, names: Names) -> list[str]:
    return [line for site in program.sites for line in _site(site, names)]


def _site(site: Site, names: Names) -> list[str]:
    frames = f"{site.axis.frames} frames of " if site.axis.frames > 1 else ""
    grid = f", {frames}{site.axis.grid[0]}×{site.axis.grid[1]}" if site.axis.grid is not None else ""
    lines = [
        f"{site.index:<2} {site.name}  {site.kind} on {site.axis.name} {names.dim(site.axis.factors)}{grid}",
        f"   {site.source.name} -> {site.output.name} -> {site.add.name}",
        f"   may {', '.join(sorted(legal_actions(site)))}",
    ]
    if site.row_proof is not None and site.row_proof.stale_inputs:
        lines.append(f"   partial takes from the cache {_list(site.row_proof.stale_inputs)}")
    if site.query_proof is not None and site.query_proof.dense_inputs:
        lines.append(f"   queries read whole {_list(site.query_proof.dense_inputs)}")
    lines += [f"   not partial: {site.reason}"] if site.reason else []
    lines += [f"   no queries: {site.no_queries}"] if site.no_queries else []
    return lines


def _outlined(program: Program) -> str:
    templates = len({s.template for s in program.segments})
    return f"{_count(len(program.segments), 'segment')} of {_count(templates, 'template')}"


def _templates(program: Program, names: Names) -> list[str]:
    groups: dict[int, list[Segment]] = {}
    for segment in program.segments:
        groups.setdefault(segment.template, []).append(segment)
    lines = []
    for template, group in groups.items():
        sites = [program.sites[i] for i in group[0].sites]
        what = ", ".join(s.name for s in sites) or "no site"
        stack = f" in a stack of {sites[0].depths}" if sites else ""
        lines.append(f"template {template} ×{len(group)}: {len(group[0].nodes)} calls, {what}{stack}")
    return lines


def _ranked(program: Program) -> str:
    able = [s for s in program.sites if s.row_proof is not None or s.query_proof is not None]
    return f"{sum(s.score_by_keys is not None for s in able)} of {_count(len(able), 'site')} ranked by an attention"


def _scores(program: Program, names: Names) -> list[str]:
    def told(source: ScoreSource | None, role: str) -> list[str]:
        if source is None:
            return []
        window = f" {source.window[0]} to {source.window[1]}" if source.window is not None else ""
        return [f"as {role}{window} of {program.sites[source.site].name}"]

    lines = []
    for site in program.sites:
        by = [*told(site.score_by_keys, "keys"), *told(site.score_by_queries, "queries")]
        if site.row_proof is not None or site.query_proof is not None:
            lines.append(f"{site.name}: {', '.join(by) or 'by age alone'}")
    return lines


def _clock(program: Program) -> str:
    return f"told by {_list(program.clock)}" if program.clock else "no input tells the time"


def _clock_inputs(program: Program, names: Names) -> list[str]:
    return [f"{n.name}: {_typed_value(n, names)}" for n in program.clock]


def _hoisted(program: Program) -> str:
    told = []
    for when in ("once a run", "once a timestep"):
        found = [s for s in program.segments if _when(s) == when]
        if found:
            told.append(f"{_count(len(found), 'segment')} of {sum(len(s.nodes) for s in found)} calls {when}")
        elif when == "once a run":
            told.append("nothing to do once a run")
    return ", ".join(told)


def _constants(program: Program, names: Names) -> list[str]:
    return [f"segment {i}: {_list(s.outputs)}, {_when(s)}" for i, s in enumerate(program.segments) if _when(s)]


def _when(segment: Segment) -> str:
    """When a segment in front is computed; nothing for those that each step computes."""
    return "once a run" if segment.constant else "once a timestep" if segment.timed else ""


FINDINGS = {
    "capture": Finding("", _captured, lambda program, names: []),
    "infer-axes": Finding("axes", _typed, _axes),
    "find-attention": Finding("attention", _attended, _attentions),
    "find-sites": Finding("sites", _branches, _sites),
    "outline": Finding("templates", _outlined, _templates),
    "find-scores": Finding("tokens are ranked", _ranked, _scores),
    "find-clock": Finding("clock", _clock, _clock_inputs),
    "hoist": Finding("once a run", _hoisted, _constants),
}


# -- the graph --------------------------------------------------------------------------------------------------------


def _graph(program: Program, names: Names | None) -> list[str]:
    """The calls with types and notes; by segment, once there are any."""
    notes = _notes(program)
    parameters = set(program.placeholders) - set(program.varying)

    def line(node: fx.Node) -> str:
        call = f"{node.name} = parameter" if node in parameters else print_call(node)
        return print_line(call, _typed_value(node, names), notes.get(node, ()))

    nodes = list(program.module.graph.nodes)
    *body, end = nodes
    if not program.segments:
        return [*map(line, body), print_call(end)]
    lines = [line(n) for n in body if n.op != "call_function" and n not in parameters]
    shown: set[fx.Node] = set()
    templates: set[int] = set()
    for i, segment in enumerate(program.segments):
        lines.append(_head(i, segment, program))
        # The first segment of a template stands for all.
        if segment.template not in templates:
            own = [n for n in segment.inputs if n in parameters and n not in shown]
            lines += [f"  {line(n)}" for n in (*own, *segment.nodes)]
            shown.update(own)
        templates.add(segment.template)
    return [*lines, print_call(end)]


def _head(i: int, segment: Segment, program: Program) -> str:
    notes = [program.sites[s].name for s in segment.sites]
    notes += ["constant during a run"] * segment.constant + ["follows from the time"] * segment.timed
    ends = f"({_list(segment.inputs)}) -> ({_list(segment.outputs)})"
    return print_line(f"segment {i} = template {segment.template}{ends}", "", notes)


def _notes(program: Program) -> dict[fx.Node, list[str]]:
    """What each call is to the sites that it belongs to."""
    notes: dict[fx.Node, list[str]] = {n: ["the time"] for n in program.clock}
    for attention in program.attentions:
        notes.setdefault(attention.node, []).append("attention")
    for site in program.sites:
        for node in site.region:
            output = ", its output" if node is site.output else ""
            notes.setdefault(node, []).append(site.name + output)
        notes.setdefault(site.add, []).append(f"adds {site.name}")
    return notes


def _typed_value(node: fx.Node, names: Names | None) -> str:
    value = print_value(value_of(node))
    results = names.types.results.get(node, ()) if names is not None else ()
    if names is None or not results:
        return value
    return f"{value} {several([names.type(names.types.type_of(node, i)) for i in range(len(results))], once=True)}"


def _list(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(n.name for n in nodes)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
