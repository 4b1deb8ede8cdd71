"""Reports: what the compiler found, what each site may do and costs, and when the policy does what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from toca_compile.compiler.cost import CostModel, K
from toca_compile.errors import TocaError
from toca_compile.ir.actions import Action, Compute, Partial, Reuse, legal_actions
from toca_compile.ir.plan import Plan, Skip, StepPlan, step_kind
from toca_compile.ir.printer import print_range, print_variant, variant_name
from toca_compile.ir.program import BlockRange, Program, Variant
from toca_compile.ir.state import State
from toca_compile.ir.types import StepKind
from toca_compile.passes.proof.block_range import find_range
from toca_compile.passes.variants.skip_range import GRAPHS, range_buffer
from toca_compile.runtime.executor import Executor
from toca_compile.session import Session

_LETTERS = {
    StepKind.FULL: "F",
    StepKind.PARTIAL: "P",
    StepKind.FORECAST: "T",
    StepKind.REUSE: "R",
    StepKind.SKIP: "S",
}


class StepCounts(dict[str, int]):
    """How many steps of a run are of each kind that occurs; ``str`` of it is such as ``14 full, 36 partial``."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.items())


@dataclass(frozen=True)
class SiteReport:
    """One residual branch. ``actions``: names of what it may do; ``reason``: why it cannot be partial, or None.
    ``flops``: of its branch at all tokens; ``flops_partial``: an expression in K, or None."""

    name: str
    kind: str
    stream: str
    actions: frozenset[str]
    reason: str | None
    tokens: int
    depth: int
    flops: int
    flops_partial: sympy.Expr | None
    share: float


class Report:
    """What ``explain`` returns; ``str`` of it is a table."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._models: dict[tuple[int, str], CostModel] = {}
        self.sites = tuple(row for i, e in enumerate(session.executors) for row in _site_rows(e, self._cost(i)))

    @property
    def program(self) -> Program:
        """The first graph after all passes: its sites, segments and what else is known of it."""
        return self._session.executors[0].program

    @property
    def plan(self) -> Plan:
        """The policy's plan for the first graph."""
        return self._session.executors[0].plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each graph (most models are one)."""
        return tuple(e.plan for e in self._session.executors)

    def flops(self, kind: str, *, symbolic: bool = False, counting: str = "published") -> int | float | sympy.Expr:
        """FLOPs of one step.

        Args:
            kind: ``"full"``, ``"partial"`` or ``"skip"`` (mean of the steps of that kind in the plan), ``"forecast"``
                or ``"reuse"``.
            symbolic: an expression in B, n, C, and K for every site that the policy makes partial.
            counting: ``"published"`` (the ToCa authors' rules, blocks only) or ``"torch"`` (as
                ``torch.utils.flop_counter``, the whole graph).

        Raises:
            TocaError: no such kind.
        """
        if kind not in [k.value for k in StepKind]:
            raise TocaError(f"kind is one of {', '.join(k.value for k in StepKind)}, not {kind!r}")
        total: int | float | sympy.Expr = 0
        for i, executor in enumerate(self._session.executors):
            cost = self._cost(i, counting)
            rows = [s for s in executor.plan.steps if s.kind.value == kind]
            if symbolic or not rows or kind not in ("partial", "skip"):
                expression = cost.symbolic(_actions(executor, kind))
                total += expression if symbolic else int(expression.subs({**cost.values, K: 0}))
            else:
                total += sum(cost.step(r) for r in rows) / len(rows)
        return total

    def run_flops(self, counting: str = "published") -> int:
        """FLOPs of a whole run under the policy; where a test at run time decides, of the last run."""
        return sum(self._cost(i, counting).run(self._as_run(e)) for i, e in enumerate(self._session.executors))

    def _as_run(self, executor: Executor) -> Plan:
        """The plan with what the last run decided; steps that it did not reach are full."""
        if not executor.plan.adaptive:
            return executor.plan
        records = self._session.control.records
        skipped = {r.index for r in records if r.kind is StepKind.SKIP and r.context == records[0].context}
        return replace(executor.plan, steps=tuple(
            StepPlan(step_kind(row), row)
            for i, step in enumerate(executor.plan.steps)
            for row in (step.sites if i in skipped else executor.schedule.computed(step.sites),)
        ))  # fmt: skip

    def flop_speedup(self, counting: str = "published") -> float:
        """FLOPs of a run with every step full, over those of a run under the policy."""
        steps = len(self.plans[0].steps)
        return float(self.flops("full", counting=counting)) * steps / self.run_flops(counting)

    @property
    def cache_bytes(self) -> int:
        """Bytes that one run keeps from step to step, once it has reached every kind of step."""
        return sum(e.planned_bytes() for e in self._session.executors)

    @property
    def buffers(self) -> dict[tuple[Any, ...], torch.Tensor]:
        """The tensors that all runs keep at this moment. A name ends in what the buffer is (``State``), the number of
        its site, and which of several it is."""
        runs = enumerate(self._session.control.runs)
        return {(number, *name): buffer for number, run in runs for name, buffer in run.buffers.items()}

    def fresh_tokens(self) -> dict[str, torch.Tensor]:
        """Which tokens each site computed in the last call: bool ``[batch, tokens]`` by site name."""
        return {name: mask for e in self._session.executors for name, mask in e.fresh_tokens().items()}

    def _cost(self, graph: int, counting: str = "published") -> CostModel:
        """The cost model of a graph, made once: it remembers what each node costs."""
        if (graph, counting) not in self._models:
            self._models[graph, counting] = CostModel(self._session.executors[graph].program, counting)
        return self._models[graph, counting]

    @property
    def schedule(self) -> str:
        """One letter a step: F full, P partial, T forecast (Taylor), R reuse, S blocks skipped."""
        return "".join(_LETTERS[s.kind] for s in self._as_run(self._session.executors[0]).steps)

    @property
    def step_counts(self) -> StepCounts:
        """The schedule's steps by kind: ``{"full": 14, "partial": 36}``."""
        kinds = [step.kind for step in self._as_run(self._session.executors[0]).steps]
        return StepCounts({kind.value: kinds.count(kind) for kind in StepKind if kind in kinds})

    def graphs(self) -> dict[str, str]:
        """As text: what was known after each pass, by its name; every variant built so far, as ``template1[reuse;
        rows]``; and what stands in for blocks that the plan skips, as ``blocks[skip]``."""
        texts: dict[str, str] = {}
        for i, (manager, executor) in enumerate(zip(self._session.managers, self._session.executors, strict=True)):
            prefix = f"graph{i}/" if len(self._session.executors) > 1 else ""
            program, plan = executor.program, executor.plan
            texts |= {prefix + name: text for name, text in manager.graphs.items()}
            for template, forms in executor.ready:
                segment = next(s for s in program.segments if s.template == template)
                variant = executor.variants.build(segment, forms, plan)
                texts[prefix + variant_name(template, forms)] = print_variant(variant, program, segment, forms)
            if plan.skipped:
                found = find_range(program, plan.skipped, plan.skip)
                for name, variant in _stand_ins(found, plan.skip).items():
                    texts[f"{prefix}blocks[{name}]"] = print_range(name, variant, program, found)
        return texts

    def __str__(self) -> str:
        rows = [
            ("site", "kind", "stream", "tokens", "actions", "GFLOPs", "partial, K of n", "share", "why not partial")
        ]
        for name, group in _grouped(self.sites):
            site = group[0]
            rows.append((
                name, site.kind, site.stream, str(site.tokens), " ".join(sorted(site.actions)),
                f"{site.flops / 1e9:.3f}", str(site.flops_partial) if site.flops_partial is not None else "–",
                f"{sum(s.share for s in group):.1%}", site.reason or "",
            ))  # fmt: skip
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append("")
        counts = self.step_counts
        lines.append(f"schedule  {self.schedule}")
        each = ", ".join(f"{kind} {float(self.flops(kind)) / 1e9:.3f}" for kind in counts)
        lines.append(
            f"{counts}; GFLOPs of a step: {each} (means); a run {self.flop_speedup():.2f}× fewer than all full; "
            f"cache {self.cache_bytes / 2**20:.1f} MB"
        )
        seconds = self._session.checked
        if seconds:
            lines.append(f"verified on random values: {len(seconds)} partial variants in {sum(seconds):.2f} s")
        if not self._session.control.time_is_visible:
            lines.append(
                "the timestep is no host value: an abandoned sampling looks like its continuation; call reset(), or "
                "tell cache_context(name, step_index=…)"
            )
        return "\n".join(lines)


def make_report(session: Session) -> Report:
    """The report of a session with at least one compiled graph."""
    return Report(session)


def _site_rows(executor: Executor, cost: CostModel) -> list[SiteReport]:
    total = sum(int(cost.site(s, Compute()).subs(cost.values)) for s in executor.program.sites) or 1
    rows = []
    for site in executor.program.sites:
        full = int(cost.site(site, Compute()).subs(cost.values))
        partial = cost.site(site, Partial()).subs(cost.values) if site.row_proof is not None else None
        rows.append(
            SiteReport(
                site.name,
                site.kind,
                site.axis.name,
                legal_actions(site),
                site.reason,
                site.axis.size,
                site.depth,
                full,
                partial,
                full / total,
            )
        )
    return rows


def _stand_ins(found: BlockRange, skip: Skip) -> dict[str, Variant]:
    """The graphs that stand in for a range of blocks, their values propagated."""
    names = ("keep", "skip", "probe") if found.probe is not None else ("keep", "skip")
    variants = {name: GRAPHS[name](found, skip) for name in names}
    for variant in variants.values():
        values = [n.meta["val"] for n in variant.module.graph.nodes if "val" in n.meta]
        slots: list[Any] = [
            range_buffer(s.kind, s.position, s.index, found, skip) if isinstance(s.kind, State) else 3
            for s in variant.slots
        ]
        mode = next(v.fake_mode for v in (*values, *slots) if isinstance(v, FakeTensor))
        FakeTensorProp(variant.module, mode).propagate_dont_convert_inputs(*values, *slots)
    return variants


def _actions(executor: Executor, kind: str) -> list[Action]:
    if kind == "full":
        return [Compute()] * len(executor.program.sites)
    if kind in ("reuse", "forecast"):
        return [Reuse()] * len(executor.program.sites)
    plan = executor.plan
    return [Partial() if plan.selects(s.index) and s.row_proof is not None else Reuse() for s in executor.program.sites]


def _grouped(sites: Sequence[SiteReport]) -> list[tuple[str, list[SiteReport]]]:
    """Sites that are the same in every block of a stack, as one row."""
    groups: dict[tuple[object, ...], list[SiteReport]] = {}
    for site in sites:
        groups.setdefault((site.kind, site.stream, site.actions, site.reason, site.flops), []).append(site)
    named = []
    for group in groups.values():
        extra = f" … {group[-1].name}  (×{len(group)})" if len(group) > 1 else ""
        named.append((group[0].name + extra, group))
    return named
