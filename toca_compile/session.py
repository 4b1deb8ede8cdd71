"""Session: what belongs to one optimised model."""

import logging
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import fx

from toca_compile.compiler.buckets import bucketed
from toca_compile.compiler.check_plan import check_plan
from toca_compile.compiler.layouts import layouts_of
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.compiler.step_program import Whole
from toca_compile.compiler.variants import ProgramVariants
from toca_compile.compiler.wrappers import Flattener, unwrapped
from toca_compile.errors import (
    NO_SITE,
    InferenceModeError,
    LoweringError,
    NoSiteError,
    PolicyError,
    TocaError,
    UnknownSizeError,
    no_rules,
)
from toca_compile.ir.actions import Selecting
from toca_compile.ir.graph import input_name, source_line
from toca_compile.ir.plan import Plan, Policy
from toca_compile.ir.program import GraphPlan, Program
from toca_compile.ir.types import Layout
from toca_compile.lowerings import find_lowering, is_dense, is_whole, of_rare_calls
from toca_compile.ops.sized_by_values import OP as SIZED_BY_VALUES
from toca_compile.passes.variants.select import SELECTIONS
from toca_compile.policies.given import checked_policy
from toca_compile.progress import working
from toca_compile.rules.registry import RULES
from toca_compile.runtime.executor import FOLLOWED, Executor
from toca_compile.runtime.graphs import MODES, Capture, Graphs, capture_for, without
from toca_compile.runtime.peers import Peers, peers_of
from toca_compile.runtime.sight import on_host
from toca_compile.runtime.step_control import StepControl

log = logging.getLogger(__name__)
aten = torch.ops.aten

_SPLIT = "torch.compile split the model into several graphs"


class Options(TypedDict, total=False):
    """The settings of a session beside its policy, as ``optimize`` takes them."""

    lowering: str
    strict: bool
    grid: tuple[int, int] | None
    hoist: bool
    mode: str | None


class Session:
    """Everything that belongs to one optimised model: its policy, its graphs, its runs.

    It knows graphs and plans, and nothing of Dynamo, which hands it graphs through ``backend.py``.
    """

    runs: ClassVar[type[Executor]] = Executor

    def __init__(
        self,
        policy: Policy | str,
        *,
        lowering: str = "inductor",
        strict: bool = True,
        grid: tuple[int, int] | None = None,
        hoist: bool = True,
        mode: str | None = None,
    ) -> None:
        policy = checked_policy(policy)
        mode = mode or "default"
        if mode not in MODES:
            raise TocaError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise PolicyError(f"grid must be the picture's (height, width) in tokens, not {grid!r}")
        self.policy, self.strict, self.grid, self.hoist, self.mode = policy, strict, grid, hoist, mode
        self.applied = policy  # what runs that begin follow
        self._plans: list[tuple[Policy, dict[int, GraphPlan]]] = []  # of policies, by graph
        self.lowering = lowering
        self._lower = find_lowering(lowering)
        self.control = StepControl(self.warn_once)
        self.executors: list[Executor] = []
        self.managers: list[PassManager] = []
        self.bounded = False  # an OptimizedModel says where calls begin and end
        self.patch: tuple[int, int] | None = None  # into which the model says that it cuts latents
        self.programs: list[Program] = []  # of all graphs, those in which nothing is cached too
        self.seen = 0  # graphs that Dynamo handed over
        self.graphs = 0  # how many the signature that was called last came in
        self.uncached: dict[str, TocaError] = {}  # why graphs of the signature that is being traced are not cached
        self.numbers: dict[Any, deque[Any]] = {}  # the Python numbers of the last calls of a run, by argument
        self._captures: dict[frozenset[torch.device], Capture | str] = {}  # of CUDA graphs, or why there are none
        self.broken = False  # whether the model comes in more than one graph
        # Whether what has a size that only values tell is one op (``passes/tracing/sized_by_values.py``), or the model
        # is split there; None: as torch.compile is told.
        self.follows_sizes: bool | None = None
        self.splits = 0  # of models there, before the call that runs
        self.breaks: dict[str, None] = {}  # why, and where, Dynamo split the model
        self.warned: dict[str, None] = {}  # what was said of it
        self.recompiles = 0  # graphs that Dynamo handed over after the first call

    def fresh(self) -> "Session":
        """One with the same settings that has seen no graph."""
        return _made(self.policy, self._settings())

    def __reduce__(self) -> Any:
        return _made, (self.policy, self._settings())

    def _settings(self) -> Options:
        return {
            "lowering": self.lowering, "strict": self.strict, "grid": self.grid, "hoist": self.hoist, "mode": self.mode,
        }  # fmt: skip

    @property
    def compiles(self) -> bool:
        """Whether the lowering compiles what it is given."""
        return of_rare_calls(self._lower) is not self._lower

    def set_policy(self, policy: Policy | str) -> None:
        """Follow another policy from the next run on; nothing is traced again, and nothing compiled again unless the
        policy needs a variant that no step so far has needed."""
        policy = checked_policy(policy)
        self.follow(policy)
        self.policy = policy
        self.control.reset()

    def set_lowering(self, name: str) -> None:
        """Lower the graphs another way from the next run on; nothing is traced again.

        Raises:
            TocaError: there is no such lowering, or it cannot hold the graphs; then all is as before.
        """
        before = self._lower, self.lowering
        self._lower, self.lowering = find_lowering(name), name
        try:
            wholes = [self._whole(executor.program) for executor in self.executors]
        except LoweringError:
            self._lower, self.lowering = before
            raise
        for executor, whole in zip(self.executors, wholes, strict=True):
            numbers = self._numbers(executor.program)
            executor.set_variants(executor.variants.lowered(self._lower, dense=is_dense(self._lower), numbers=numbers))
            executor.whole, executor.peers = whole, self._peers(executor.program)
        self.control.reset()

    def _peers(self, program: Program) -> Peers | None:
        """The processes that share a graph, if it is shared; all settings but one change what is sent."""
        return peers_of(program, str({k: v for k, v in self._settings().items() if k != "strict"}))

    def _variants(self, program: Program) -> ProgramVariants:
        numbers = self._numbers(program)
        return ProgramVariants(program, self._lower, dense=is_dense(self._lower), numbers=numbers)

    def _numbers(self, program: Program) -> torch.device | None:
        """Where the numbers of a step lie for variants, if in memory."""
        capture = self._capture(program)
        return capture.device if capture is not None else None

    def _whole(self, program: Program) -> Whole | None:
        """What makes one graph of all steps, if the lowering takes that.

        Raises:
            LoweringError: there is none.
        """
        if not is_whole(self._lower):
            return None
        if program.fragment:
            raise LoweringError(
                f"lowering={self.lowering!r} makes one graph of a step, and {self.split()}: mend the break, or take "
                "another lowering"
            )
        return Whole(self._lower)

    def follow(self, policy: Policy) -> None:
        """Let runs that begin follow ``policy`` (the user's own, with the numbers of that run). Runs of other threads
        keep the plans that they began with: whoever calls for them says which, at each call."""
        if policy is self.applied or policy == self.applied:
            return
        plans = [self._plan(policy, executor.number, executor.program) for executor in self.executors]
        for executor, plan in zip(self.executors, plans, strict=True):
            executor.set_plan(plan)
        self.applied = policy

    def _plan(self, policy: Policy, number: int, program: Program) -> GraphPlan:
        """What a policy plans for a graph, checked, and said what the user should know of it; made once."""
        plans = next((plans for known, plans in self._plans if known == policy), None)
        if plans is None:
            plans = {}
            self._plans = [*self._plans[1 - FOLLOWED :], (policy, plans)]
        if number not in plans:
            checked = check_plan(policy, program, self.warn_once)
            if self._capture(program) is not None and not checked.plan.adaptive:
                checked = replace(checked, plan=bucketed(checked.plan, program.sites))
            plans[number] = checked
            self._say_what_it_means(policy, checked.plan)
            self._explain_choices(program, checked)
            self._explain_refusals(policy, program, checked.plan)
        return plans[number]

    def compile(self, graph: fx.GraphModule, static_inputs: tuple[bool, ...], inputs: Sequence[Any]) -> Executor:
        """One graph of the model, after all passes, with the policy's plan for it.

        Args:
            static_inputs: which inputs are parameters or buffers of the model.

        Raises:
            NoSiteError: there is nothing to cache in it.
            TocaError: it cannot be compiled with caching; the message says why.
        """
        if self.broken:
            for executor in self.executors:
                if executor.graphs is not None and not executor.graphs.refused:
                    executor.graphs.refuse(_SPLIT)
        given = frozenset(i for i, fixed in enumerate(static_inputs) if not fixed)
        flat = Flattener(inputs, static_inputs)
        if flat.needed:
            graph, static_inputs = unwrapped(graph, static_inputs, inputs)
            inputs = flat(inputs)
        manager = PassManager(PIPELINE if self.hoist else [p for p in PIPELINE if p.name != "hoist"])
        with working("proving what may be cached"):
            layouts, as_host = self._layouts(static_inputs, inputs), self.control.times.as_host
            known = tuple(isinstance(x, torch.Tensor) and on_host(as_host(x)) for x in inputs)
            program = manager.run(
                Program(graph, static_inputs, tuple(inputs), self.grid, known, self.broken, layouts=layouts)
            )
        self.programs.append(program)
        for node in program.module.graph.nodes:
            if node.target is aten.dropout.default and node.args[1] > 0 and node.args[2]:
                raise InferenceModeError("the model is in training mode (dropout is active): call model.eval() first")
        if not program.sites:
            if self.follows_sizes and program.module.graph.find_nodes(op="call_function", target=SIZED_BY_VALUES):
                raise UnknownSizeError("all that could be cached has a size that only values tell")
            calls = (
                n for n in program.module.graph.nodes if n.op == "call_function" and n.target is not operator.getitem
            )
            unknown = tuple(dict.fromkeys(str(n.target) for n in calls if n.target not in RULES))
            error = NoSiteError(f"no site was found: the graph {NO_SITE} {no_rules(unknown)}".rstrip())
            error.unknown = unknown
            raise error
        plan = self._plan(self.applied, self.seen, program)
        variants, capture, whole = self._variants(program), self._capture(program), self._whole(program)
        names = tuple(input_name(n) for n in program.placeholders)
        graphs = Graphs(capture, names, static_inputs, self.warn_once) if capture is not None else None
        executor = self.runs(program, plan, self.control, variants, self.seen, flat if flat.needed else None)
        executor.graphs, executor.whole = graphs, whole
        executor.peers, executor.given = self._peers(program), given
        executor.names = tuple(input_name(n) for n in graph.graph.nodes if n.op == "placeholder")
        self.managers.append(manager)
        self.executors.append(executor)
        return executor

    def _capture(self, program: Program) -> Capture | None:
        """How steps of a graph are recorded; None where they are not, which is said if it was asked for."""
        if self.mode == "default":
            return None
        if is_whole(self._lower):
            self.warn_once(without(f"lowering={self.lowering!r} runs whole steps by itself"))
            return None
        if program.fragment:
            self.warn_once(without(_SPLIT))
            return None
        devices = frozenset(program.accelerators)
        if devices not in self._captures:
            self._captures[devices] = capture_for(devices)
        found = self._captures[devices]
        if isinstance(found, str):
            self.warn_once(without(found))
            return None
        return found

    def _layouts(self, static_inputs: tuple[bool, ...], inputs: Sequence[Any]) -> tuple[Layout, ...]:
        """How tokens lie, as the graph's inputs tell it and those of the model; the user's word goes before."""
        if self.grid is not None:
            return ()
        own = (x for x, fixed in zip(inputs, static_inputs, strict=True) if not fixed)
        return layouts_of((*own, *self.control.call_inputs.values()), self.patch)

    @property
    def checked(self) -> list[float]:
        """Seconds that it took to hold each checked variant against its plain meaning."""
        return [seconds for e in self.executors for seconds in e.variants.checked.values()]

    @property
    def recorded(self) -> int:
        """How many CUDA graphs there are."""
        return sum(fixed.graphs for known in self.control.fixed.values() for fixed in known)

    def forget(self, executors: Sequence[Executor]) -> None:
        """Drop graphs that no call will reach again, and their runs."""
        numbers = {e.number for e in executors}
        kept = [(e, m) for e, m in zip(self.executors, self.managers, strict=True) if e.number not in numbers]
        self.executors, self.managers = [e for e, _ in kept], [m for _, m in kept]
        self.programs = [e.program for e in self.executors]
        self._plans = [(p, {n: plan for n, plan in plans.items() if n not in numbers}) for p, plans in self._plans]
        self.control.forget_graphs(numbers)

    def split(self, graphs: int | None = None) -> str:
        """How Dynamo split the model, and into how many ``graphs``, as a sentence; nothing where it did not."""
        if not self.broken:
            return ""
        why = "; ".join(self.breaks) or 'TORCH_LOGS="graph_breaks" tells where'
        into = "" if graphs == 1 else f" into {graphs or 'several'} graphs"
        return (
            f"torch.compile split it{into}, and a branch that begins in one and ends in another is no site: {why}. "
            "What cannot be traced may be made an op (torch.library.custom_op)"
        )

    def warn_once(self, message: str) -> None:
        """Say it once in this session."""
        if message not in self.warned:
            self.warned[message] = None
            log.warning(message)

    def _say_what_it_means(self, policy: Policy, plan: Plan) -> None:
        """What a policy that fits itself to the run makes of it, and that one leaves nothing out."""
        computed = [all(action.dense for action in step.sites) for step in plan.steps]
        meaning = policy.meaning(plan, sum(computed)) if hasattr(policy, "meaning") else ""
        if meaning:
            self.warn_once(meaning)
        elif all(computed) and not plan.endless:
            self.warn_once(
                f"all {len(computed)} steps of a run are computed under {policy}, so nothing is cached: a run this "
                "short leaves nothing out, or take a policy that does"
            )

    def _explain_choices(self, program: Program, checked: GraphPlan) -> None:
        assert program.types is not None
        plan = checked.plan
        for stream in checked.range.streams if checked.range is not None and plan.skip.residual else ():
            if stream.entry is None:
                self.warn_once(
                    f"the stream that the blocks to skip end in ({source_line(stream.output)}) is none of those that "
                    "enter them: it is joined between the blocks. A step that skips them reuses or forecasts the "
                    "stream itself, and not what the blocks add to it; to keep that, skip those behind it alone "
                    "(first=…)"
                )
        partial = [s for s in program.sites if plan.selects(s.index)]
        for source in filter(None, map(plan.selector.source, partial)):
            SELECTIONS.find(plan.selector).check(plan.selector, program.sites[source.site], program.types)
        for doubt in plan.selector.doubts(partial):
            self.warn_once(doubt)

    def _explain_refusals(self, policy: Policy, program: Program, plan: Plan) -> None:
        """Say where a policy computes some tokens of its sites and none of them can."""
        if any(plan.selects(site.index) for site in program.sites):  # one that cannot update keys makes them anew
            return
        parts = policy.composition() if hasattr(policy, "composition") else policy
        rules = (*getattr(parts, "rules", ()), *getattr(parts, "alternate", ()))
        asked = [
            (site, rule.do.of(1, 0).refused(site))
            for site in program.sites
            for rule in rules
            if isinstance(rule.do, Selecting) and rule.matches(site)
        ]
        if asked and all(why for _, why in asked):
            site, why = asked[0]
            self.warn_once(
                f"the policy computes some of the tokens, and in this graph no site can: {site.name} {why}; all are "
                "reused"
            )


def patch_of(model: Any) -> tuple[int, int] | None:
    """The height and width of the patches into which a model says (``config.patch_size``) that it cuts latents."""
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    sizes = tuple(patch[-2:]) if isinstance(patch, (tuple, list)) else (patch, patch)
    return sizes if len(sizes) == 2 and all(type(s) is int and s > 0 for s in sizes) else None


def _made(policy: Policy, settings: Options) -> Session:
    return Session(policy, **settings)
