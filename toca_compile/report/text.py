"""A report as text: at most 100 columns wide, and the same words as in the README."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, Field, replace
from typing import TYPE_CHECKING, Any

from toca_compile.ir.plan import Policy
from toca_compile.policies.presets import PRESETS, named
from toca_compile.report.data import GraphReport, SiteReport, StepCounts
from toca_compile.runtime.graphs import without

if TYPE_CHECKING:
    from toca_compile.report.report import Report

WIDTH = 100
_NUMBERS = 8  # that are written out
_NAME = 50  # columns of the longest name of a site that stands in the table's line

KINDS = {
    "full": "every site computes all its tokens",
    "partial": "some sites are computed, or some tokens of them",
    "forecast": "outputs are forecast from earlier full steps",
    "reuse": "outputs of the last full step are reused",
    "skip": "a range of blocks does not run; what it added to the stream is reused or forecast",
}
_ACTIONS = {
    "compute": "all tokens are computed",
    "partial": "the selected tokens are computed, the others reused or forecast",
    "queries": "the selected tokens are computed, against the attention's keys of all tokens",
    "forecast": "the kept output is moved along its differences between full steps",
    "reuse": "the kept output stands in",
    "skip": "the site's block does not run",
}


def print_report(report: "Report") -> str:
    """The text of ``explain``."""
    parts = report.transformers
    sections = [_transformer(name, part) for name, part in parts.items()]
    data = [graph for part in parts.values() for graph in part.data]
    return "\n\n".join("\n".join(lines) for lines in [*sections, *([_legend(data)] if data else [])])


def policy_name(policy: Policy) -> str:
    """A policy as one would write it: a published configuration by its name, or the class with the fields that are not
    their defaults."""
    name = named(policy)
    if not name:
        return written(policy)
    steps = getattr(policy, "num_steps", None)
    return f'preset("{name}"' + (")" if steps == PRESETS[name].num_steps else f", num_steps={steps})")


def megabytes(count: float) -> str:
    """Bytes as MB, of 2²⁰ bytes each."""
    return f"{count / 2**20:.1f} MB" if count >= 2**20 / 20 or not count else f"{count / 2**20:.3f} MB"


def amount(count: float) -> str:
    """A number of FLOPs: ``1.23 G``."""
    if not count:
        return "0"
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 0.9995 * 10**power:
            return (
                f"{count / 10**power:.3g} {letter}"
                if count < 999.5 * 10**power
                else f"{count / 10**power:.0f} {letter}"
            )
    return f"{count / 1e3:.3g} k"


def labelled(label: str, text: str, width: int = 11) -> list[str]:
    """A line that begins with its label; what does not fit goes on below."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{width}} ", subsequent_indent=" " * (width + 1), break_on_hyphens=False
    ) or [label]


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows with their columns aligned, a rule under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    to_right = set(right)
    lines = [
        "  ".join(c.rjust(w) if i in to_right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return [line.rstrip() for line in lines]


def title(text: str) -> list[str]:
    """A heading."""
    return [text, "=" * min(len(text), WIDTH)]


def _transformer(name: str, report: "Report") -> list[str]:
    """One transformer: its policy, what is expected of it, and each of its graphs."""
    subject = report.subject
    session = subject.session
    lines = title(f"{name}: {subject.model}" if name else subject.model)
    lines += labelled("policy", policy_name(session.policy))
    if session.applied != session.policy:
        lines += labelled("", f"in the last run {_change(session.policy, session.applied)}")
    lines += labelled("lowering", session.lowering)
    if session.mode != "default":
        lines += labelled("mode", f"{session.mode}: {session.recorded} CUDA graphs are recorded")
    if not report.compiled:
        lines += labelled("compiled", "nothing is compiled yet: call the model once, then its sites are known")
        return [*lines, *_notes(report)]
    fewer = f"{report.flop_speedup():.2f}× fewer FLOPs in a run than with every step full"
    lines += labelled("prediction", f"{fewer} (counted, not timed)")
    lines += labelled("cache", f"{megabytes(report.cache_bytes)} from step to step, once for each guidance pass")
    sent = {kind: report.sent_bytes(kind) for kind in report.step_counts}
    if any(sent.values()):
        each = ", ".join(f"{megabytes(count)} in a {kind} step" for kind, count in sent.items())
        lines += labelled("sends", f"{each}: what a process hands to the others")
    data = report.data
    known: dict[Any, int] = {}
    for i, graph in enumerate(data):
        groups = grouped(graph.sites)
        does = [_does(graph, places) for _, places in groups]
        first = known.setdefault((tuple(name for name, _ in groups), tuple(does)), i)
        number = f" {i + 1}" if len(data) > 1 else ""
        lines += ["", *labelled(f"inputs{number}", ", ".join(f"{n} {kind}" for n, kind in graph.inputs.items())), ""]
        if first == i:
            lines += _sites(graph, groups, does)
        else:
            lines.append(f"its sites are those of inputs {first + 1}, and do the same")
        lines += ["", *_schedule(graph), *_counts(report, i)]
    return [*lines, *_notes(report)]


def _change(policy: Any, applied: Policy) -> str:
    """What a run made of the policy."""
    steps = getattr(applied, "num_steps", None)
    if getattr(policy, "num_steps", steps) != steps and replace(policy, num_steps=steps) == applied:
        return f"for {steps} steps"
    return f"as {policy_name(applied)}"


def _sites(graph: GraphReport, groups: Sequence[tuple[str, list[int]]], does: Sequence[str]) -> list[str]:
    """The table of sites; under each what it does, what it may do, and why not more."""
    rows = [("site", "kind", "tokens", "FLOPs", "share")]
    below: list[list[str]] = []
    for (name, places), done in zip(groups, does, strict=True):
        site = graph.sites[places[0]]
        share = f"{sum(graph.sites[i].share for i in places):.1%}"
        long = len(name) > _NAME
        rows.append((
            "" if long else name, site.kind, f"{site.tokens} {site.stream}", amount(site.flops), share
        ))  # fmt: skip
        details = [*_detail("does", done), *_detail("may", ", ".join(_in_order(site.actions)))]
        below.append([*details, *(_detail("not partial:", site.reason) if site.reason else [])])
    lines = table(rows, right=(3, 4))
    told = lines[:2]
    for line, (name, _), details in zip(lines[2:], groups, below, strict=True):
        told += [name] * (len(name) > _NAME) + [line, *details]
    return told


def _in_order(words: AbstractSet[str]) -> list[str]:
    return [*(w for w in _ACTIONS if w in words), *sorted(words - set(_ACTIONS))]


def _detail(label: str, text: str) -> list[str]:
    indent = f"    {label:<5}" if len(label) <= 5 else f"    {label} "
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=" " * 9, break_on_hyphens=False)


def _does(graph: GraphReport, places: Sequence[int]) -> str:
    """In how many steps the sites do what: ``compute 14, partial 36 (18 of 256 tokens)``."""
    counts = [Counter(step.actions[i] for step in graph.steps) for i in places]
    parts = []
    for word in dict.fromkeys(step.actions[i] for step in graph.steps for i in places):
        times = _span([c[word] for c in counts])
        computed = [s.tokens[i] for s in graph.steps for i in places if s.actions[i] == word]
        size = graph.sites[places[0]].tokens
        some = word != "compute" and any(computed)
        parts.append(f"{word} {times}" + (f" ({_span(computed)} of {size} tokens)" if some else ""))
    return ", ".join(parts)


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least}–{most}"


def _schedule(graph: GraphReport) -> list[str]:
    letters = "".join(step.letter for step in graph.steps)
    room = WIDTH - len("schedule  ")
    pieces = [letters[i : i + room] for i in range(0, len(letters), room)]
    return [("schedule  " if not i else " " * 10) + piece for i, piece in enumerate(pieces)]


def _counts(report: "Report", graph: int) -> list[str]:
    counts = Counter(step.kind for step in report.data[graph].steps)
    kinds = [k for k in KINDS if k in counts]
    each = ", ".join(f"{kind} {float(report.graph_flops(graph, kind)) / 1e9:.3f}" for kind in kinds)
    text = f"{StepCounts({k: counts[k] for k in kinds})}; GFLOPs of a step: {each} (means)"
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ")


def _notes(report: "Report") -> list[str]:
    """What else the user should know."""
    session = report.subject.session
    notes = []
    if session.checked:
        variants = f"{len(session.checked)} partial variant{'s' * (len(session.checked) > 1)}"
        notes.append(f"verified on random values: {variants} in {sum(session.checked):.2f} s")
    if not session.control.time_is_visible:
        notes.append(
            "the timestep is no host value: an abandoned sampling looks like its continuation; loop over what "
            "begin(timesteps) returns, or call reset(), or tell cache_context(name, step_index=…)"
        )
    if session.broken:
        notes.append(session.split(session.graphs))
    notes += [said for said in session.warned if said.startswith(without(""))]
    return [line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="    ")]


def _legend(data: Sequence[GraphReport]) -> list[str]:
    """The words that occur."""
    kinds = {(step.letter, step.kind) for graph in data for step in graph.steps}
    actions = {word for graph in data for site in graph.sites for word in site.actions}
    lines = [
        "site: a residual branch, x ← x + gate · branch(norm(x)). does: in how many steps it does what.",
        "FLOPs: of its branch at all tokens, once; share: of all sites. schedule: a letter a step.",
    ]
    steps = [(f"{letter} {kind}", KINDS[kind]) for kind in KINDS for letter, k in kinds if k == kind]
    words = [(word, text) for word, text in _ACTIONS.items() if word in actions]
    width = max(len(label) for label, _ in (*steps, *words))
    return [*lines, *(f"  {label:<{width}}  {text}" for label, text in (*steps, *words))]


def grouped(sites: Sequence[SiteReport]) -> list[tuple[str, list[int]]]:
    """Sites that are the same in every block of a stack, as one row: its name, and their places."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, site in enumerate(sites):
        groups.setdefault((site.kind, site.stream, site.actions, site.reason, site.flops), []).append(i)
    rows = []
    for places in groups.values():
        first, last = sites[places[0]].name, sites[places[-1]].name
        times = f"  (×{len(places)})"
        name = first if len(places) == 1 else f"{first} … {last}{times}"
        if len(name) > _NAME and len(places) > 1:
            other = [b for a, b in zip(first.split("."), last.split("."), strict=False) if a != b]
            name = f"{first} … {other[0]}{times}" if len(other) == 1 else name
        rows.append((name, places))
    return rows


def written(value: Any) -> str:
    """A dataclass without the fields that are their defaults (of a level, its name is told all the same); anything else
    as it is, but for long rows of numbers."""
    if isinstance(value, tuple):
        if len(value) > _NUMBERS and all(isinstance(v, float) for v in value):
            return f"({value[0]:.4g}, …, {value[-1]:.4g}: {len(value)} numbers)"
        return f"({', '.join(map(written, value))}{',' * (len(value) == 1)})"
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is None:
        text = repr(value)
        return type(value).__name__ if " at 0x" in text else text
    given = [f"{n}={written(getattr(value, n))}" for n, f in fields.items() if f.repr and _is_told(value, f)]
    return f"{type(value).__name__}({', '.join(given)})"


def _is_told(value: Any, field: Field[Any]) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(field.metadata.get("told") or getattr(value, field.name) != default)
