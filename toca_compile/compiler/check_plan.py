"""A policy's plan, held against what the sites of a graph can do: whatever a policy says, no run starts that reads what
no step wrote, or computes what no proof covers."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from toca_compile.errors import PolicyError, TocaError
from toca_compile.ir.actions import Action
from toca_compile.ir.fields import MAX_STEPS, accept, checked, told
from toca_compile.ir.plan import Plan, Policy, StepPlan, step_kind
from toca_compile.ir.precision import rounding_error, unusable
from toca_compile.ir.program import GraphPlan, Program
from toca_compile.ir.types import Site, StepKind
from toca_compile.passes.proof.block_range import find_range

_COARSE = 0.01  # relative error from which on a cache's dtype is worth a warning


def check_plan(policy: Policy, program: Program, warn: Callable[[str], None]) -> GraphPlan:
    """The policy's plan for the sites of a graph.

    Args:
        policy: the user's.
        program: the graph after all passes.
        warn: is told what the user should know of a plan that can be followed.

    Raises:
        PolicyError: it is no plan, asks a site for what it cannot do, or reads a cache before it was written. The
            message names the step, the site and the value.
    """
    *preferred, last = getattr(policy, "choices", (policy,))
    for choice in preferred:
        with contextlib.suppress(PolicyError):
            return _checked(choice, program, warn)
    return _checked(last, program, warn)


def _checked(policy: Policy, program: Program, warn: Callable[[str], None]) -> GraphPlan:
    plan = _planned(policy, program.sites)
    made: dict[int, int] = {}  # of each site that is written, how many differences
    good: set[tuple[int, int, int | None]] = set()  # what was asked already: a plan says the same thing many times
    for i, step in enumerate(plan.steps):
        for site, action in zip(program.sites, step.sites, strict=True):
            asked = (site.index, id(action), made.get(site.index))
            if asked not in good:
                why = _cannot(site, action, made.get(site.index))
                if why is not None:
                    raise PolicyError(f"step {i}: {site.name} {why}")
                good.add(asked)
            if action.dense:
                made[site.index] = action.made
        if step.kind is not step_kind(step.sites):
            raise PolicyError(f"step {i} says {step.kind}, and what its sites do makes it {step_kind(step.sites)}")
    skipped = plan.skipped
    for site in program.sites:
        _check_site(site, plan, plan.skip.threshold is not None and site.index in skipped)
    if plan.skip.limit is not None and plan.skip.threshold is None:
        raise PolicyError("plan.skip.limit goes with a threshold: without one the steps themselves say what is skipped")
    if any({j for j, a in enumerate(step.sites) if a.by_blocks} not in (set(), skipped)
           for step in plan.steps):  # fmt: skip
        raise PolicyError("all steps that skip blocks must skip the same ones")
    found = find_range(program, skipped, plan.skip) if skipped else None
    _check_storage(plan, program, warn)
    return GraphPlan(plan, found, repr(policy))


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
        raise PolicyError("the policy plans no step: plan(sites) must give at least one StepPlan")
    if len(plan.steps) > MAX_STEPS:
        raise PolicyError(
            f"a plan has at most {MAX_STEPS} steps, not {len(plan.steps)}: with endless=True it repeats its last step, "
            "and otherwise a further call starts it again"
        )
    known: dict[int, Action] = {}
    steps = tuple(_step(i, step, sites, known) for i, step in enumerate(plan.steps))
    return replace(checked(replace(plan, steps=()), "plan"), steps=steps)


def _step(i: int, step: StepPlan, sites: Sequence[Site], known: dict[int, Action]) -> StepPlan:
    if not isinstance(step, StepPlan) or not isinstance(step.sites, tuple | list):
        raise PolicyError(f"step {i} of the plan must be a StepPlan with a tuple of sites, not {told(step)}")
    if len(step.sites) != len(sites):
        raise PolicyError(f"step {i} of the plan names {len(step.sites)} sites; the model has {len(sites)}")
    for site, action in zip(sites, step.sites, strict=True):
        if id(action) not in known:
            if not isinstance(action, Action):
                raise PolicyError(f"step {i}: {site.name} must be an Action, not {told(action)}")
            known[id(action)] = checked(action, f"step {i}: {site.name}")
    return StepPlan(accept(StepKind, step.kind, f"step {i}: kind"), tuple(known[id(action)] for action in step.sites))


def _cannot(site: Site, action: Action, made: int | None) -> str | None:
    """Why a site cannot do this, after a step that computed all and made so many differences (None: there was none)."""
    why = action.refused(site)
    if why is not None:
        return why
    if made is None and not action.dense:
        return "would read a cache that no earlier step of the run wrote"
    most = 0 if made is None else made + 1
    if action.made > most:
        return f"can make {most} differences to earlier full steps (one more with each), not order {action.made}"
    if action.used > (made or 0):
        return f"has {made or 0} differences there, not order {action.used} to forecast by"
    return None


def _check_site(site: Site, plan: Plan, undecided: bool) -> None:
    """What relates the steps of one site. ``undecided``: a test at run time says whether it is skipped."""
    keep = plan.keep(site.index)
    if undecided and keep.history is not None:
        raise PolicyError(
            f"{site.name} lies among blocks that are skipped or computed as a test at run time decides; "
            "it cannot also be reused, forecast or partial, which needs to know before"
        )
    remedy = keep.history.why_not_by_token() if keep.history is not None and keep.by_token else None
    if remedy is not None:
        raise PolicyError(
            f"{site.name} keeps tokens one by one, which have a history each: {remedy}, or update=False in its steps"
        )
    why = plan.selector.refused(site) if plan.selects(site.index) else None
    if why is not None:
        raise PolicyError(f"{site.name} {why}")
    last = plan.steps[-1].sites[site.index]
    if plan.endless and not last.endless:
        raise PolicyError(
            f"{site.name} is {last.word} in the last step of an endless plan, which repeats without being "
            "counted: it may be computed, reused or skipped there"
        )


def _check_storage(plan: Plan, program: Program, warn: Callable[[str], None]) -> None:
    """Refuse what caches cannot lie in, or where they cannot lie, and say what a coarse dtype loses."""
    for device in sorted(plan.cache_devices):
        try:
            torch.empty(1, device=device)
        except Exception as trouble:  # each backend has its own
            raise PolicyError(
                f"cache_device: nothing can lie on {device!r} ({str(trouble).splitlines()[0]})"
            ) from trouble
    for dtype in sorted(plan.cache_dtypes, key=str):
        devices = {site.output.meta["val"].device for site in program.sites}
        for device in sorted(devices, key=str):
            why = unusable(dtype, device)
            if why is not None:
                raise PolicyError(f"cache_dtype: torch cannot keep {told(dtype)} on {device} ({why}): take 'bfloat16'")
        error = rounding_error(dtype)
        if error > _COARSE:
            warn(
                f"caches in {dtype} lose {error:.1%} of what they keep (root mean square, of normal values): "
                f"'bfloat16' loses {rounding_error(torch.bfloat16):.2%}"
            )
