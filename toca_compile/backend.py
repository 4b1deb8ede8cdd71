"""The Dynamo backend: one session for each optimised model, which turns every graph of it into an executor."""

import logging
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.weak import WeakTensorKeyDictionary

from toca_compile.compiler import numeric_check
from toca_compile.compiler.check_plan import check_plan
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.compiler.trace import show
from toca_compile.errors import GRAD_ENABLED, NO_SITE, InferenceModeError, NoSiteError, PolicyError, TocaError
from toca_compile.ir.calls import tensors
from toca_compile.ir.graph import source_line, value_of
from toca_compile.ir.plan import CacheSpec, Plan, Policy
from toca_compile.ir.printer import print_variant, variant_name
from toca_compile.ir.program import Mode, Program, Segment, Slot, Variant
from toca_compile.ir.types import Site
from toca_compile.ir.verify import verify_variant
from toca_compile.lowerings import lowering as find_lowering
from toca_compile.passes.proof.block_range import find_range
from toca_compile.passes.variants.measure_scores import check_score
from toca_compile.passes.variants.rewrite import rewrite
from toca_compile.passes.variants.skip_range import keep_range, probe_range, skip_range
from toca_compile.policies.storage import checked_policy
from toca_compile.runtime.executor import FOLLOWED, Compiled, Executor, example_buffer
from toca_compile.runtime.skipping import Skipping, range_buffer
from toca_compile.runtime.step_control import StepControl

log = logging.getLogger(__name__)
aten = torch.ops.aten


class Session:
    """Everything that belongs to one optimised model: its policy, its graphs, its runs.

    Dynamo keeps its backends and what they return for as long as the process lives, so it is given neither the session
    nor an executor, but stand-ins that refer to them weakly (``dynamo_backend``, ``_Graph``).

    A graph that cannot be compiled with caching gets a callable that raises the typed error when it is called (with
    ``strict``), or runs uncached after one warning: Dynamo wraps what a backend raises, and users should see our error.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        lowering: str = "inductor",
        strict: bool = True,
        grid: tuple[int, int] | None = None,
        hoist: bool = True,
    ) -> None:
        policy = checked_policy(policy)
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise PolicyError(f"grid must be the picture's (height, width) in tokens, not {grid!r}")
        self.policy, self.strict, self.grid, self.hoist = policy, strict, grid, hoist
        self.applied = policy  # what runs that begin follow
        self._plans: list[tuple[Policy, dict[int, Plan]]] = []  # of policies, by graph
        self.lowering = lowering
        self._lower = find_lowering(lowering)
        self.control = StepControl(self.warn_once)
        self.executors: list[Executor] = []
        self.managers: list[PassManager] = []
        self.bounded = False  # an OptimizedModel says where calls begin and end
        self.seen = 0  # graphs that Dynamo handed over
        self.uncached: dict[str, TocaError] = {}  # why graphs of the signature that is being traced are not cached
        self.checked: dict[tuple[Any, ...], float] = {}  # variants held against their dense meaning, and the seconds
        self.numbers: dict[Any, Any] = {}  # the Python numbers of the last call, by argument
        self.changes: dict[Any, int] = {}
        self._broken = False
        self.breaks: dict[str, None] = {}  # why, and where, Dynamo split the model
        self._warned: set[str] = set()

    def fresh(self) -> "Session":
        """One with the same settings that has seen no graph."""
        return _made(self.policy, self._settings())

    def __reduce__(self) -> Any:
        return _made, (self.policy, self._settings())

    def _settings(self) -> dict[str, Any]:
        return {"lowering": self.lowering, "strict": self.strict, "grid": self.grid, "hoist": self.hoist}

    def set_policy(self, policy: Policy) -> None:
        """Follow another policy from the next run on; nothing is traced again, and nothing compiled again unless the
        policy needs a variant that no step so far has needed."""
        self.follow(checked_policy(policy))
        self.policy = policy
        self.control.reset()

    def follow(self, policy: Policy) -> None:
        """Let runs that begin follow ``policy`` (the user's own, with the numbers of that run). Runs of other threads
        keep the plans that they began with: whoever calls for them says which, at each call."""
        if policy is self.applied or policy == self.applied:
            return
        plans = [self._plan(policy, executor.number, executor.program) for executor in self.executors]
        for executor, plan in zip(self.executors, plans, strict=True):
            executor.set_plan(plan)
        self.applied = policy

    def _plan(self, policy: Policy, number: int, program: Program) -> Plan:
        """What a policy plans for a graph, checked, and said what the user should know of it; made once."""
        plans = next((plans for known, plans in self._plans if known == policy), None)
        if plans is None:
            plans = {}
            self._plans = [*self._plans[1 - FOLLOWED :], (policy, plans)]
        if number not in plans:
            plan = check_plan(policy, program, self.warn_once)
            self._explain_choices(program, plan)
            plans[number] = plan
        return plans[number]

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph that Dynamo found."""
        self.seen += 1
        reason: Any = getattr(gm, "compile_subgraph_reason", None)
        if getattr(reason, "graph_break", False):
            self._broken = True
            at = f" ({reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno})" if reason.user_stack else ""
            self.breaks[f"{str(reason.reason).splitlines()[0]}{at}"] = None
        self._broken |= _is_nested()
        try:
            if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                raise InferenceModeError(GRAD_ENABLED)
            executor = self._compile(gm, inputs)
        except NoSiteError as error:
            self.uncached.setdefault(str(error), error)
            if self.strict and not self.bounded and not self._broken and not self.executors:
                return _raising(error)
            if not self.bounded and not self.executors:
                self.warn_once(str(error))
            return self._plain(gm, inputs)
        except TocaError as error:
            self.uncached.setdefault(str(error), error)
            if self.strict:
                return _raising(error)
            self.warn_once(f"{str(error).rstrip('.')}. The graph runs uncached.")
            return self._plain(gm, inputs)
        self.executors.append(executor)
        return _Graph(executor, None if self.bounded else self)

    def forget(self, executors: Sequence[Executor]) -> None:
        """Drop graphs that no call will reach again, and their runs."""
        numbers, programs = {e.number for e in executors}, {id(e.program) for e in executors}
        self.checked = {key: seconds for key, seconds in self.checked.items() if key[0] not in programs}
        kept = [(e, m) for e, m in zip(self.executors, self.managers, strict=True) if e.number not in numbers]
        self.executors, self.managers = [e for e, _ in kept], [m for _, m in kept]
        self._plans = [(p, {n: plan for n, plan in plans.items() if n not in numbers}) for p, plans in self._plans]
        self.control.forget_graphs(numbers)

    def warn_once(self, message: str) -> None:
        """Say it once in this session."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message)

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Executor:
        program = Program(gm, _static_inputs(gm, inputs), tuple(inputs), self.grid)
        passes = PIPELINE if self.hoist else [p for p in PIPELINE if p.name != "hoist"]
        manager = PassManager(passes)
        program = manager.run(program)
        for node in program.module.graph.nodes:
            if node.target is aten.dropout.default and node.args[1] > 0 and node.args[2]:
                raise InferenceModeError("the model is in training mode (dropout is active): call model.eval() first")
        if not program.sites:
            raise NoSiteError(f"no site was found: the graph {NO_SITE}")
        plan = self._plan(self.applied, self.seen, program)
        executor = Executor(program, plan, self.control, self._variants(program), self._skipping(program), self.seen)
        self.managers.append(manager)
        return executor

    def _skipping(self, program: Program) -> Callable[[Plan, dict[fx.Node, int]], Skipping | None]:
        def make(plan: Plan, place: dict[fx.Node, int]) -> Skipping | None:
            if not plan.skipped:
                return None
            found = find_range(program, plan.skipped, plan.skip)

            def compiled(name: str) -> Compiled:
                if name in ("keep", "skip"):
                    variant = (keep_range if name == "keep" else skip_range)(found, plan.skip)
                else:
                    variant = probe_range(found, keep=name == "keep probe")
                examples: list[Any] = [n.meta["val"] for n in variant.module.graph.nodes if "val" in n.meta]
                examples = [e.new_empty(e.shape) for e in examples]  # segments meet at contiguous values
                examples += [range_buffer(s, found, plan.skip) if s.is_buffer else 3 for s in variant.slots]
                return self._lower(variant, examples), variant.values, variant.slots

            return Skipping(found, plan.skip, place, compiled)

        return make

    def _variants(
        self, program: Program
    ) -> Callable[[Segment, tuple[Mode, ...], tuple[CacheSpec, ...], Plan], Compiled]:
        def compiled(
            segment: Segment, modes: tuple[Mode, ...], memories: tuple[CacheSpec, ...], plan: Plan
        ) -> Compiled:  # fmt: skip
            variant = self.variant(program, segment, modes, memories, plan)
            name = variant_name(segment.template, modes)
            show(name, lambda: "built", lambda: print_variant(variant, program, segment, modes))
            examples = [_example(segment.inputs[i]) for i in variant.values]
            sites = [program.sites[i] for i in segment.sites]
            examples += [_slot_example(slot, sites[slot.position], program, plan) for slot in variant.slots]
            return self._lower(variant, examples), variant.values, variant.slots

        return compiled

    def variant(
        self, program: Program, segment: Segment, modes: tuple[Mode, ...], memories: tuple[CacheSpec, ...], plan: Plan
    ) -> Variant:
        """The rewritten graph of a segment, checked against what it stands for."""
        assert program.types is not None
        # The first segment of the template stands for all: inputs, outputs and sites correspond by position.
        exemplar = next(s for s in program.segments if s.template == segment.template)
        sites = [program.sites[i] for i in exemplar.sites]
        dense = self.lowering == "dense"
        variant = rewrite(exemplar, sites, modes, program.types, plan.selector, memories, dense=dense)
        _propagate(variant, exemplar, program, plan)
        verify_variant(variant, exemplar)
        if any(Mode.PARTIAL in m for m in modes) and not dense and self._is_due(program, segment, modes):
            began = time.perf_counter()
            meaning = rewrite(exemplar, sites, modes, program.types, plan.selector, memories, dense=True)
            examples: dict[Any, Any] = {i: _example(n) for i, n in enumerate(exemplar.inputs)}
            for slot in (*variant.slots, *meaning.slots):
                examples[slot] = _slot_example(slot, sites[slot.position], program, plan)
            names, shared = [s.name for s in sites], plan.selector.shared_pair
            numeric_check.check_partial(variant, meaning, examples, names, shared_pair=shared)
            self.checked[id(program), segment.template, modes] = time.perf_counter() - began
        return variant

    def _is_due(self, program: Program, segment: Segment, modes: tuple[Mode, ...]) -> bool:
        """Whether a partial variant is checked: the first of its template, or each (``TOCA_VERIFY=all``)."""
        asked = numeric_check.wanted()
        if asked is numeric_check.Checks.NONE or (id(program), segment.template, modes) in self.checked:
            return False
        first = not any(key[:2] == (id(program), segment.template) for key in self.checked)
        return first or asked is numeric_check.Checks.ALL

    def _explain_choices(self, program: Program, plan: Plan) -> None:
        assert program.types is not None
        found = find_range(program, plan.skipped, plan.skip) if plan.skipped and plan.skip.residual else None
        for node, entry in zip(found.outputs, found.entries, strict=True) if found is not None else ():
            if entry is None:
                self.warn_once(
                    f"no stream like {node.name} ({source_line(node)}) enters the blocks to skip, so what they add to "
                    "it is not known: a step that skips them reuses the stream itself"
                )
        partial = [s for s in program.sites if plan.partial(s.index)]
        score = plan.selector.score
        for site in partial if plan.selector.scored else ():
            scorer = site.scorer(score)
            if scorer is not None and program.sites[scorer.site].attention:
                check_score(program.sites[scorer.site].attention[-1], score, program.types)
            elif scorer is None:
                kind = "cross-attention" if score == "entropy" else "self-attention"
                self.warn_once(f"no {kind} runs over the tokens of {site.name}: they are ranked by age alone")
        if plan.selector.bonus and partial and all(s.axis.grid is None for s in partial):
            self.warn_once(
                "the token grid is not visible in the graph, so no token gets the grid bonus; "
                "give it with optimize(..., grid=(height, width))"
            )

    def _plain(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.lowering != "inductor":
            return gm.forward
        return lookup_backend("inductor")(gm, list(inputs))


def _made(policy: Policy, settings: dict[str, Any]) -> Session:
    return Session(policy, **settings)


def toca(gm: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="toca", options={"policy": policy, …})``.

    Options are the keywords of ``toca_compile.optimize``: ``policy``, ``lowering``, ``strict``, ``grid``, ``hoist``.
    """
    owner = sys._getframe(1).f_locals.get("self")
    try:
        session = session_of(owner, options)
        graph = session(gm, inputs)
        if isinstance(graph, _Graph) and owner is not None:
            owner._toca_starting = None  # from here on the graph keeps the session, and later the model
        return graph
    except TocaError as error:
        return _raising(error)


def session_of(owner: Any, options: dict[str, Any] | None = None) -> Session:
    """The session of one torch.compile call, found by the object by which torch represents that call.

    Raises:
        PolicyError: the options have no policy, or an unknown key.
    """
    session = getattr(owner, "_toca_session", lambda: None)()
    if session is None:
        given = dict(options or {})
        if "policy" not in given:
            raise PolicyError(
                'backend="toca" needs a policy: torch.compile(model, backend="toca", options={"policy": policy})'
            )
        unknown = set(given) - {"policy", "lowering", "strict", "grid", "hoist"}
        if unknown:
            raise PolicyError(f"unknown options for backend 'toca': {', '.join(sorted(unknown))}")
        session = Session(given.pop("policy"), **given)
        if owner is not None:
            owner._toca_session, owner._toca_starting = weakref.ref(session), session
    return session


# Sessions of bare torch.compile calls, by the first parameter of their model: they live as long as it does.
_BY_PARAMETER = WeakTensorKeyDictionary()


class _Graph:
    """What Dynamo is given for one graph: it refers to the executor weakly, once a parameter of the model holds the
    session (``starting``) in its place."""

    def __init__(self, executor: Executor, starting: Session | None) -> None:
        # A list, since Dynamo copies our attributes into a wrapper of its own.
        self._executor, self._starting = weakref.ref(executor), [starting] if starting is not None else []

    def __call__(self, *inputs: Any) -> Any:
        executor = self._executor()
        if executor is None:
            raise TocaError("this graph belongs to an optimised model that is gone")
        if self._starting and executor.parameter(inputs) is not None:
            held = _BY_PARAMETER.setdefault(executor.parameter(inputs), [])
            held += [s for s in self._starting if s not in held]
            self._starting.clear()
        return executor(*inputs)


def dynamo_backend(session: Session) -> Callable[..., Any]:
    """The session as Dynamo's backend, without keeping it alive."""
    weak = weakref.ref(session)

    def toca_session(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        live = weak()
        return gm.forward if live is None else live(gm, inputs)

    return toca_session


def _is_nested() -> bool:
    """Whether the frame being compiled was called by user code that runs uncompiled: then it is a fragment of the
    model, not the model. Between torch.compile's wrapper and Dynamo there are otherwise torch's own frames only."""
    frame = sys._getframe(1)
    own = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    while frame.f_code.co_name != "compile_wrapper":
        if not frame.f_code.co_filename.startswith(own) or frame.f_back is None:
            return frame.f_back is not None
        frame = frame.f_back
    return False


def _raising(error: TocaError) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def _static_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[bool, ...]:
    """Which inputs are parameters or buffers of the model."""
    fixed = []
    for node, value in zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True):
        source = getattr(node.meta.get("grapharg"), "source", None)
        owned = False
        if source is not None:
            guard = source.guard_source
            guard = guard() if callable(guard) else guard
            owned = guard.is_unspecialized_nn_module() or guard.is_specialized_nn_module()
        fixed.append(owned or isinstance(value, torch.nn.Parameter))
    return tuple(fixed)


def _example(node: fx.Node) -> Any:
    """A fake tensor as the segment will see the value: inputs as they are, what other segments compute contiguous."""
    value = value_of(node)
    given = node.op in ("placeholder", "get_attr") or not isinstance(value, torch.Tensor)
    return value if given else value.new_empty(value.shape)


def _slot_example(slot: Slot, site: Site, program: Program, plan: Plan) -> Any:
    """A fake buffer, or a number that could be one: some K, some step."""
    if slot.is_buffer:
        return example_buffer(slot, site, program, plan)
    return max(1, site.axis.size // 2) if slot.kind == "k" else 3


def _propagate(variant: Variant, exemplar: Segment, program: Program, plan: Plan) -> None:
    """Give every node of a variant its value, as fake tensors, with some K."""
    examples: list[Any] = [value_of(exemplar.inputs[i]) for i in variant.values]
    sites = [program.sites[i] for i in exemplar.sites]
    examples += [_slot_example(slot, sites[slot.position], program, plan) for slot in variant.slots]
    modes = {t.fake_mode for t in tensors(examples) if isinstance(t, torch._subclasses.FakeTensor)}
    with modes.pop() if modes else torch.no_grad():
        _Propagate(variant.module).run(*examples)


class _Propagate(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value
