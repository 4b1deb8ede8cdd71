"""Reports: what the compiler found, what each site may do and costs, and when the policy does what.

``Report.data`` holds all of it as plain data, graph by graph; ``text.py`` prints it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
import torch

from toca_compile.compiler.cost import CostModel, K
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.errors import NoSiteError, PolicyError, TocaError
from toca_compile.ir.actions import Action, Compute, Partial, Reuse, legal_actions
from toca_compile.ir.graph import value_of
from toca_compile.ir.plan import Plan, Policy, StepPlan, step_kind
from toca_compile.ir.printer import print_variant, variant_name
from toca_compile.ir.program import Chain, Program
from toca_compile.ir.types import StepKind
from toca_compile.policies.storage import as_data
from toca_compile.report.data import LETTERS, GraphReport, SiteReport, StepCounts, StepReport
from toca_compile.report.page import Shown, page
from toca_compile.report.rules import list_used
from toca_compile.report.text import print_report
from toca_compile.runtime.executor import Executor
from toca_compile.runtime.step_control import StepRecord
from toca_compile.session import Session


@dataclass(frozen=True)
class Subject:
    """What is explained: a session with the name of its model's class and of the arguments of its calls."""

    session: Session
    model: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Graph:
    """One graph, with what belongs to it."""

    name: str  # of its transformer
    subject: Subject
    executor: Executor
    manager: PassManager

    @property
    def session(self) -> Session:
        return self.subject.session


class Report:
    """What ``explain`` returns; ``str`` of it is a table, at most 100 columns wide.

    Of a pipeline with several transformers ``program``, ``plan``, ``schedule`` and ``step_counts`` are the first one's;
    ``transformers`` has a report for each.
    """

    def __init__(self, subjects: Mapping[str, Subject]) -> None:
        self._subjects = dict(subjects)
        self._session = self.subject.session
        self._graphs = [
            _Graph(name, subject, executor, manager)
            for name, subject in self._subjects.items()
            for executor, manager in zip(subject.session.executors, subject.session.managers, strict=True)
        ]
        self._models: dict[tuple[int, str], CostModel] = {}
        self._counted: dict[tuple[int, str, tuple[int, ...]], tuple[StepPlan, int]] = {}

    @cached_property
    def sites(self) -> tuple[SiteReport, ...]:
        """The residual branches of all graphs; none before the first call."""
        return tuple(row for i, g in enumerate(self._graphs) for row in _site_rows(g.executor, self._cost(i)))

    @property
    def transformers(self) -> dict[str, "Report"]:
        """A report for each transformer of a pipeline, by its name; for a model alone the name is empty."""
        return {name: Report({name: subject}) for name, subject in self._subjects.items()}

    @property
    def subject(self) -> Subject:
        """The session, and the names that go with it; of a pipeline that of the first transformer."""
        return next(iter(self._subjects.values()))

    @property
    def compiled(self) -> bool:
        """Whether there is a graph yet: before the first call nothing is known but the policy."""
        return bool(self._graphs)

    @property
    def policy(self) -> Policy:
        """The policy, as the user gave it."""
        return self._session.policy

    @property
    def cuda_graphs(self) -> int:
        """How many steps are recorded as CUDA graphs now (``mode="reduce-overhead"``)."""
        return sum(subject.session.recorded for subject in self._subjects.values())

    @property
    def program(self) -> Program:
        """The first graph after all passes: its sites, segments and what else is known of it."""
        return self._first.executor.program

    @property
    def plan(self) -> Plan:
        """The policy's plan for the first graph."""
        return self._first.executor.plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each graph (most models are one)."""
        return tuple(g.executor.plan for g in self._graphs)

    @cached_property
    def data(self) -> tuple[GraphReport, ...]:
        """Everything as plain data, graph by graph: sites, and for each step what they do, with tokens, FLOPs and
        time."""
        return tuple(self._graph_data(i) for i in range(len(self._graphs)))

    def save(self, path: str | Path, shown: Shown | None = None) -> None:
        """Write the report as one page of HTML that needs no network.

        Args:
            path: of the file.
            shown: a picture, tokens and error curves to show beside it.

        Raises:
            TocaError: the file cannot be written.
        """
        try:
            policy: Any = as_data(self.policy)
        except PolicyError:  # the user's own
            policy = repr(self.policy)
        text = page("toca_compile", self.data, policy, str(self), shown or Shown())
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise TocaError(f"{path} cannot be written: {error.strerror or error}") from error

    def rules(self) -> str:
        """Which axis rules the graphs of the last call use, and which ops of them have none, as text."""
        sessions = [subject.session for subject in self._subjects.values()]
        refused = {
            why: None for s in sessions for why, error in s.uncached.items() if not isinstance(error, NoSiteError)
        }
        return list_used([program for s in sessions for program in s.programs], refused)

    def flops(self, kind: str, *, symbolic: bool = False, counting: str = "published") -> int | float | sympy.Expr:
        """FLOPs of one step.

        Args:
            kind: ``"full"``, ``"partial"`` or ``"skip"`` (mean of the steps of that kind in the plan), ``"forecast"``
                or ``"reuse"``.
            symbolic: an expression in B, n, C, and K for every site that the policy makes partial.
            counting: ``"published"`` (the ToCa authors' rules, blocks only) or ``"torch"`` (as
                ``torch.utils.flop_counter``, the whole graph).

        Raises:
            TocaError: no such kind, or nothing is compiled yet.
        """
        if kind not in [k.value for k in StepKind]:
            raise TocaError(f"kind is one of {', '.join(k.value for k in StepKind)}, not {kind!r}")
        if not self._graphs:
            raise _too_early()
        return sum(self.graph_flops(i, kind, symbolic=symbolic, counting=counting) for i in range(len(self._graphs)))

    def graph_flops(
        self, graph: int, kind: str, *, symbolic: bool = False, counting: str = "published"
    ) -> int | float | sympy.Expr:
        """The same of one graph, by its place in ``data``."""
        executor, cost = self._graphs[graph].executor, self._cost(graph, counting)
        rows = [s for s in executor.plan.steps if s.kind.value == kind]
        if symbolic or not rows or kind not in ("partial", "skip"):
            expression = cost.symbolic(_actions(executor, kind))
            return expression if symbolic else int(expression.subs({**cost.values, K: 0}))
        return sum(self._step_flops(graph, r, counting) for r in rows) / len(rows)

    def run_flops(self, counting: str = "published") -> int:
        """FLOPs of a whole run under the policy; where a test at run time decides, of the last run."""
        return sum(self._cost(i, counting).run(self._as_run(g)) for i, g in enumerate(self._graphs))

    def _as_run(self, graph: _Graph) -> Plan:
        """The plan with what the last run decided; steps that it did not reach are full."""
        executor = graph.executor
        if not executor.plan.adaptive:
            return executor.plan
        records = graph.session.control.records
        skipped = {r.index for r in records if r.kind is StepKind.SKIP and r.context == records[0].context}
        return replace(executor.plan, steps=tuple(
            StepPlan(step_kind(row), row)
            for i, step in enumerate(executor.plan.steps)
            for row in (step.sites if i in skipped else executor.schedule.computed(step.sites),)
        ))  # fmt: skip

    def flop_speedup(self, counting: str = "published") -> float:
        """FLOPs of a run with every step full, over those of a run under the policy."""
        full = sum(
            float(self.graph_flops(i, "full", counting=counting)) * len(g.executor.plan.steps)
            for i, g in enumerate(self._graphs)
        )
        if not full:
            raise _too_early()
        return full / self.run_flops(counting)

    def sent_bytes(self, kind: str) -> float:
        """Bytes that a process hands to collectives in one step, where several share the model's work (tensor
        parallel), without what they agree by on tokens. ``kind``: as of ``flops``."""
        shared = any(g.executor.program.types.groups for g in self._graphs if g.executor.program.types is not None)
        return float(self.flops(kind, counting="sent")) if shared else 0.0

    @property
    def cache_bytes(self) -> int:
        """Bytes that one run keeps from step to step, once it has reached every kind of step."""
        return sum(g.executor.planned_bytes() for g in self._graphs)

    @property
    def schedule(self) -> str:
        """One letter a step: F full, P partial, T forecast (Taylor), R reuse, S blocks skipped."""
        return "".join(LETTERS[s.kind] for s in self._as_run(self._first).steps)

    @property
    def step_counts(self) -> StepCounts:
        """The schedule's steps by kind: ``{"full": 14, "partial": 36}``."""
        kinds = [step.kind for step in self._as_run(self._first).steps]
        return StepCounts({kind.value: kinds.count(kind) for kind in StepKind if kind in kinds})

    def record_flops(self, record: StepRecord, name: str = "") -> int:
        """FLOPs of one model call that was made; ``name``: of its transformer."""
        total = 0
        for i, graph in enumerate(self._graphs):
            plan, executor = graph.executor.plan, graph.executor
            for key in (k for k in record.graphs if k[0] == executor.number and name == graph.name):
                row = plan.steps[min(record.index, len(plan.steps) - 1)].sites
                if record.kind is StepKind.FULL:
                    row = (_COMPUTE,) * len(row)
                elif not record.skipped(key):
                    row = executor.schedule.computed(row)
                total += self._step_flops(i, StepPlan(record.kind, row))
        return total

    def full_flops(self, record: StepRecord, name: str = "") -> int:
        """FLOPs that the call would have had as a step of the uncached model."""
        used = [(g.executor.number, i) for i, g in enumerate(self._graphs) if g.name == name]
        return sum(int(self.graph_flops(i, "full")) for key in record.graphs for number, i in used if key[0] == number)

    def constant_flops(self) -> int:
        """FLOPs of what is computed once a run."""
        return sum(self._cost(i).run(replace(g.executor.plan, steps=())) for i, g in enumerate(self._graphs))

    def graphs(self) -> dict[str, str]:
        """As text: what was known after each pass, by its name; every variant built so far, as ``template1[reuse;
        rows]``; what stands in for blocks that the plan skips, as ``blocks[skip]``; and segments that are one graph,
        as ``segments1-5[reuse]``, beside the parts."""
        texts: dict[str, str] = {}
        for i, graph in enumerate(self._graphs):
            prefix = f"graph{i}/" if len(self._graphs) > 1 else ""
            executor, manager = graph.executor, graph.manager
            program, plan = executor.program, executor.plan
            texts |= {prefix + name: text for name, text in manager.graphs.items()}
            segments = executor.schedule.kinds
            # Blocks that another plan skips are not among the segments.
            ready = [(segments[kind], forms) for kind, forms in executor.ready if kind in segments]
            ready += [part for segment, forms in ready if isinstance(segment, Chain) for part in segment.apart(forms)]
            for segment, forms in ready:
                name = prefix + variant_name(segment, forms)
                if name not in texts:
                    variant = executor.variants.build(segment, forms, plan)
                    texts[name] = print_variant(variant, program, segment, forms)
            if executor.whole is not None:
                texts[f"{prefix}program"] = str(executor.whole(executor, executor.schedule))
        return texts

    def __str__(self) -> str:
        return print_report(self)

    @property
    def _first(self) -> _Graph:
        if not self._graphs:
            raise _too_early()
        return self._graphs[0]

    @property
    def buffers(self) -> dict[tuple[Any, ...], torch.Tensor]:
        """The tensors that all runs of the first transformer keep at this moment. A name ends in what the buffer is
        (``State``), the number of its site, and which of several it is."""
        runs = enumerate(self._session.control.runs)
        return {(number, *name): buffer for number, run in runs for name, buffer in run.buffers.items()}

    def _cost(self, graph: int, counting: str = "published") -> CostModel:
        """The cost model of a graph, made once: it remembers what each node costs."""
        if (graph, counting) not in self._models:
            self._models[graph, counting] = CostModel(self._graphs[graph].executor.program, counting)
        return self._models[graph, counting]

    def _step_flops(self, graph: int, step: StepPlan, counting: str = "published") -> int:
        """FLOPs of a step. Rows of a plan that say the same hold the same objects, so each is counted once."""
        key = graph, counting, tuple(map(id, step.sites))
        if key not in self._counted:
            self._counted[key] = step, self._cost(graph, counting).step(step)  # the step, so that no id is used again
        return self._counted[key][1]

    def _graph_data(self, i: int) -> GraphReport:
        graph = self._graphs[i]
        program = graph.executor.program
        took: dict[int, list[float]] = {}
        for record in graph.session.control.records:
            if not record.compiled and any(key[0] == graph.executor.number for key in record.graphs):
                took.setdefault(record.index, []).append(record.seconds)
        steps = tuple(
            StepReport(
                number, step.kind.value, LETTERS[step.kind], tuple(a.word for a in step.sites),
                tuple(a.computed(s) for a, s in zip(step.sites, program.sites, strict=True)),
                self._step_flops(i, step), tuple(took.get(number, ())),
            )
            for number, step in enumerate(self._as_run(graph).steps)
        )  # fmt: skip
        return GraphReport(
            graph.name, _inputs(graph), tuple(_site_rows(graph.executor, self._cost(i))), steps,
            int(self.graph_flops(i, "full")), graph.executor.planned_bytes(),
        )  # fmt: skip


_COMPUTE = Compute()


def _inputs(graph: _Graph) -> dict[str, str]:
    """What a graph is called with, by name, without weights."""
    program, names = graph.executor.program, graph.executor.names
    varying = set(program.varying)
    found: dict[str, str] = {}
    for i, node in enumerate(program.placeholders):
        if node not in varying:
            continue
        name = names[i] if i < len(names) else ""
        if name.isdigit():
            name = (
                graph.subject.arguments[int(name)] if int(name) < len(graph.subject.arguments) else f"argument {name}"
            )
        value = value_of(node)
        kind = _kind(value) if isinstance(value, torch.Tensor) else type(value).__name__
        name = name or "input"
        while name in found:
            name += "'"
        found[name] = kind
    return found


def _kind(value: torch.Tensor) -> str:
    kind, bits = ("f" if value.is_floating_point() else "i"), value.element_size() * 8
    name = {torch.bfloat16: "bf16", torch.bool: "bool"}.get(value.dtype, f"{kind}{bits}")
    return f"{name}[{', '.join(map(str, value.shape))}]"


def _too_early() -> TocaError:
    return TocaError("nothing is compiled yet: call the model once, then explain it")


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


def _actions(executor: Executor, kind: str) -> list[Action]:
    if kind == "full":
        return [Compute()] * len(executor.program.sites)
    if kind in ("reuse", "forecast"):
        return [Reuse()] * len(executor.program.sites)
    plan = executor.plan
    return [Partial() if plan.selects(s.index) and s.row_proof is not None else Reuse() for s in executor.program.sites]
