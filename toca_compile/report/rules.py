"""Rules, as text: all that there are, and those that a model's graphs use or lack."""

import inspect
from collections.abc import Callable, Iterable, Sequence

from torch import fx
from torch._ops import OpOverload

from toca_compile.ir.graph import source_line
from toca_compile.ir.program import Program
from toca_compile.rules.registry import RULES, Rule

_WIDTH = 120


def list_rules() -> str:
    """Every op that has a rule, a line each: the op, its rule, and what that says, by the file that it stands in."""
    return "\n".join([f"{len(RULES)} ops have rules, in toca_compile/rules/", *_by_file(RULES.values(), _meaning)])


def list_used(programs: Sequence[Program], refused: Iterable[str] = ()) -> str:
    """Which rules the graphs of a model use, and what they lack.

    Args:
        programs: its graphs as the passes left them.
        refused: why graphs are not among them.
    """
    calls: dict[OpOverload, list[fx.Node]] = {}
    missing: dict[tuple[OpOverload, str], list[tuple[fx.Node, Program]]] = {}
    for program in programs:
        assert program.types is not None
        types = program.types
        for node in program.module.graph.nodes:
            if not isinstance(node.target, OpOverload):
                continue
            if node in types.unknown:
                missing.setdefault((node.target, types.unknown[node]), []).append((node, program))
            else:
                calls.setdefault(node.target, []).append(node)
    used, lacking = sum(map(len, calls.values())), sum(map(len, missing.values()))
    lines = [
        f"{_count(len(programs), 'graph')}, {_count(used + lacking, 'call')}: {used} of {_count(len(calls), 'op')} "
        f"follow a rule, {lacking} do not"
    ]
    lines += [f"not looked at: {why}" for why in refused]
    if missing:
        lines += ["", "without a rule"]
    for (op, why), found in sorted(missing.items(), key=lambda item: str(item[0][0])):
        lines.append(
            f"  {op} {why}: {_count(len(found), 'call')}, first at {source_line(found[0][0])}; {_stopped(found)}"
        )
    lines += ["", "used", *_by_file((RULES[op] for op in calls), lambda rule: _count(len(calls[rule.op]), "call"))]
    return "\n".join(lines)


def _stopped(found: Sequence[tuple[fx.Node, Program]]) -> str:
    """The sites whose proof ended at one of these calls."""
    names = [
        site.name
        for node, program in found
        for site in program.sites
        for told in (site.reason, site.no_queries)
        if told is not None and told.startswith(f"{node.target} ") and told.endswith(f"({source_line(node)})")
    ]
    return f"stops {', '.join(dict.fromkeys(names))}" if names else "stops no site"


def _by_file(rules: Iterable[Rule], told: Callable[[Rule], str]) -> list[str]:
    listed = sorted(rules, key=lambda rule: (_file(rule), str(rule.op)))
    wide = [max((len(str(text)) for text in column), default=0) for column in zip(*map(_names, listed), strict=True)]
    lines: list[str] = []
    for i, rule in enumerate(listed):
        if i == 0 or _file(rule) != _file(listed[i - 1]):
            lines.append(f"  {_file(rule)}")
        op, name = (text.ljust(width) for text, width in zip(_names(rule), wide, strict=True))
        line = f"    {op}  {name}  {told(rule)}"
        lines.append(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 2].rstrip(' ,;:')} …")
    return lines


def _names(rule: Rule) -> tuple[str, str]:
    return str(rule.op), getattr(rule.axes, "__name__", "rule")


def _file(rule: Rule) -> str:
    return f"{rule.axes.__module__.rsplit('.', 1)[-1]}.py"


def _meaning(rule: Rule) -> str:
    return " ".join((inspect.getdoc(rule.axes) or "").split())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
