"""A policy's plan, held against what the sites of a graph can do: whatever a policy says, no run starts that reads what
no step wrote, or computes what no proof covers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from toca_compile.errors import PolicyError, TocaError
from toca_compile.ir.fields import MAX_STEPS, accept, checked, told
from toca_compile.ir.plan import SELECTING, Plan, Policy, SiteStep, StepPlan, step_kind
from toca_compile.ir.precision import rounding_error, unusable
from toca_compile.ir.program import Program
from toca_compile.ir.types import Action, Site, StepKind
from toca_compile.passes.proof.block_range import find_range

_COARSE = 0.01  # relative error from which on a cache's dtype is worth a warning


def check_plan(policy: Policy, program: Program, warn: Callable[[str], None]) -> Plan:
    """The policy's plan for the sites of a graph.

    Args:
        policy: the user's.
        program: the graph after all passes.
        warn: is told what the user should know of a plan that can be followed.

    Raises:
        PolicyError: it is no plan, asks a site for what it cannot do, or reads a cache before it was written. The
            message names the step, the site and the value.
    """
    plan = _planned(policy, program.sites)
    made: dict[int, int] = {}  # of each site that is written, how many differences
    for i, step in enumerate(plan.steps):
        for site, todo in zip(program.sites, step.sites, strict=True):
            why = _cannot(site, todo, made.get(site.index))
            if why is not None:
                raise PolicyError(f"step {i}: {site.name} {why}")
            if todo.action is Action.COMPUTE:
                made[site.index] = todo.order
        if step.kind is not step_kind(step.sites):
            raise PolicyError(f"step {i} says {step.kind}, and what its sites do makes it {step_kind(step.sites)}")
    skipped = plan.skipped
    for site in program.sites:
        _check_site(site, plan, plan.skip.threshold is not None and site.index in skipped)
    if plan.skip.limit is not None and plan.skip.threshold is None:
        raise PolicyError("plan.skip.limit goes with a threshold: without one the steps themselves say what is skipped")
    if any({j for j, s in enumerate(step.sites) if s.action is Action.SKIP} not in (set(), skipped)
           for step in plan.steps):  # fmt: skip
        raise PolicyError("all steps that skip blocks must skip the same ones")
    if skipped:
        find_range(program, skipped, plan.skip)
    _check_dtypes(plan, program, warn)
    return plan


def _planned(policy: Policy, sites: Sequence[Site]) -> Plan:
    """What the policy returns, if it is made of what plans are made of; its numbers as Python's own."""
    name = type(policy).__name__
    try:
        plan = policy.plan(tuple(sites))
    except TocaError:
        raise
    except Exception as error:  # a policy may be the user's own code
        raise PolicyError(f"{name}.plan failed: {type(error).__name__}: {error}") from error
    if not isinstance(plan, Plan) or not isinstance(plan.steps, tuple | list):
        what = f"one with steps {told(plan.steps)}" if isinstance(plan, Plan) else told(plan)
        raise PolicyError(f"{name}.plan must return a toca_compile.ir.plan.Plan with a tuple of steps, not {what}")
    if not plan.steps:
        raise PolicyError("the policy plans no step")
    if len(plan.steps) > MAX_STEPS:
        raise PolicyError(
            f"a plan has at most {MAX_STEPS} steps, not {len(plan.steps)}: with endless=True it repeats its last step, "
            "and otherwise a further call starts it again"
        )
    known: dict[tuple[object, ...], SiteStep] = {}
    steps = tuple(_step(i, step, sites, known) for i, step in enumerate(plan.steps))
    return replace(checked(replace(plan, steps=()), "plan"), steps=steps)


def _step(i: int, step: StepPlan, sites: Sequence[Site], known: dict[tuple[object, ...], SiteStep]) -> StepPlan:
    if not isinstance(step, StepPlan) or not isinstance(step.sites, tuple | list):
        raise PolicyError(f"step {i} of the plan must be a StepPlan with a tuple of sites, not {told(step)}")
    if len(step.sites) != len(sites):
        raise PolicyError(f"step {i} of the plan names {len(step.sites)} sites; the model has {len(sites)}")
    rows = tuple(_site_step(f"step {i}: {s.name}", todo, known) for s, todo in zip(sites, step.sites, strict=True))
    return StepPlan(accept(StepKind, step.kind, f"step {i}: kind"), rows)


def _site_step(path: str, todo: SiteStep, known: dict[tuple[object, ...], SiteStep]) -> SiteStep:
    """With its fields checked; each that was seen before is the same object."""
    if not isinstance(todo, SiteStep):
        raise PolicyError(f"{path} must be a SiteStep, not {told(todo)}")
    values = vars(todo).values()
    if any(type(v) not in (Action, int, str, bool) for v in values):
        return checked(todo, path)
    key = tuple((type(v), v) for v in values)  # True equals 1
    if key not in known:
        known[key] = checked(todo, path)
    return known[key]


def _cannot(site: Site, todo: SiteStep, made: int | None) -> str | None:
    """Why a site cannot do this, after a computed step that made so many differences (None: there was no such step)."""
    action, size = todo.action, site.axis.size
    if action not in site.actions:
        return f"cannot be {action.value}: {site.no_queries if action is Action.QUERIES else site.reason}"
    if made is None and action is not Action.COMPUTE:
        return "would read a cache that no earlier step of the run wrote"
    if action in SELECTING and not 1 <= todo.tokens <= size:
        return f"has {size} tokens, not {todo.tokens} to compute"
    own = size if action is Action.COMPUTE else 0
    if action not in SELECTING and todo.tokens not in (0, own):
        return f"computes {own} tokens where it is {action.value}, not {todo.tokens}"
    if (
        action is Action.QUERIES
        and todo.keys == "update"
        and site.query_proof is not None
        and not site.query_proof.updates
    ):
        return "cannot update its keys: they are not token-wise in its input; take keys='fresh' or 'keep'"
    most = made or 0
    if action is Action.COMPUTE:
        most = 0 if made is None else made + 1
        if todo.order > most:
            return f"can make {most} differences to earlier full steps (one more with each), not order {todo.order}"
    elif todo.order > most:
        return f"has {most} differences there, not order {todo.order} to forecast by"
    return None


def _check_site(site: Site, plan: Plan, undecided: bool) -> None:
    """What relates the steps of one site. ``undecided``: a test at run time says whether it is skipped."""
    if undecided and plan.reads(site.index):
        raise PolicyError(
            f"{site.name} lies among blocks that are skipped or computed as a test at run time decides; "
            "it cannot also be reused, forecast or partial, which needs to know before"
        )
    if plan.memory.basis == "newton" and plan.tokenwise(site.index):
        raise PolicyError(
            f"{site.name} keeps tokens one by one, which have a history each: plan.memory.basis='taylor', or "
            "update=False in its steps"
        )
    last = plan.steps[-1].sites[site.index]
    if plan.endless and (last.action in SELECTING or (last.action is Action.FORECAST and last.order)):
        raise PolicyError(
            f"{site.name} is {last.action.value} in the last step of an endless plan, which repeats without being "
            "counted: it may be computed, reused or skipped there"
        )


def _check_dtypes(plan: Plan, program: Program, warn: Callable[[str], None]) -> None:
    """Refuse a cache dtype that cannot be used on the graph's device, and say what a coarse one loses."""
    rows = any(s.action in SELECTING for step in plan.steps for s in step.sites)
    kept = {plan.memory.dtype} if any(plan.reads(site.index) for site in program.sites) else set()
    kept |= {plan.skip.memory.dtype} if plan.skipped else set()
    for dtype in sorted(kept - {None}, key=str):
        assert dtype is not None
        devices = {site.output.meta["val"].device for site in program.sites}
        for device in sorted(devices, key=str):
            why = unusable(dtype, device, rows=rows)
            if why is not None:
                raise PolicyError(f"cache_dtype: torch cannot keep {told(dtype)} on {device} ({why}): take 'bfloat16'")
        error = rounding_error(dtype)
        if error > _COARSE:
            limit = torch.finfo(dtype).max
            warn(
                f"caches in {dtype} lose {error:.1%} of what they keep (root mean square, of normal values), and "
                f"numbers beyond ±{limit:g} are lost: 'bfloat16' loses {rounding_error(torch.bfloat16):.2%}"
            )
