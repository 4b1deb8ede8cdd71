"""The public calls: ``optimize`` and ``explain``."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from torch import nn

from toca_compile.backend import compiled_session
from toca_compile.diffusers import attach, detach, is_pipeline, optimized_components, transformers_of
from toca_compile.errors import TocaError
from toca_compile.in_place import convert, handle_of, revert, tidy
from toca_compile.ir.plan import Policy
from toca_compile.model import Controls, Handle, OptimizedModel, SessionControls, wrap
from toca_compile.report import Report, Subject, Summary, summarise
from toca_compile.session import Options, Session

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

Pipeline = TypeVar("Pipeline")


@overload
def optimize(model: nn.Module, policy: Policy | str = "balanced", **options: "Unpack[Options]") -> OptimizedModel: ...
@overload
def optimize(model: Pipeline, policy: Policy | str = "balanced", **options: "Unpack[Options]") -> Pipeline: ...


def optimize(model: Any, policy: Policy | str = "balanced", **options: "Unpack[Options]") -> Any:
    """A drop-in replacement of ``model`` that caches as ``policy`` says. A bare ``model`` itself is not changed.

    A diffusers pipeline is optimised in place and returned: its transformer stays the object that it is, so that LoRA
    and all else go on working, and ``restore(pipe)`` undoes it. Each call of the pipeline is then
    one run with as many steps as its scheduler makes of it (any ``num_inference_steps``, a part of them for
    image-to-image, two a step for second-order schedulers); guidance passes have caches of their own; the caches are
    freed at the end of the call, and after an exception.

    Nothing is compiled until the first call. With ``lowering="eager"`` the same rewritten graphs run without Inductor.

    Args:
        model: a diffusion transformer that Dynamo can trace, in eval mode; or a diffusers pipeline with one.
        policy: ``ToCa(...)``, ``TaylorSeer(...)``, ``BlockCache(...)``, a ``Composition`` or any other; or by name a
            level (``"quality"``, ``"balanced"``, ``"fast"``, ``"max"``: see ``Level``) or a preset.
        lowering: ``"inductor"`` (the default), ``"eager"``, or ``"program"``: whole steps as one graph, op by op (see
            ``toca_compile.program``).
        strict: (the default) raise where the model or the policy leaves nothing to cache; otherwise warn once and run
            uncached.
        grid: the picture's height and width in tokens, where the graph does not show it.
        hoist: (the default) compute what follows from the text alone (its keys and values) once a run. Changes of the
            text or of those weights are seen by value on the CPU; on a GPU by object, version and address, so not those
            written through ``.data`` into the same memory: ``hoist=False`` for a loop that does that.
        mode: ``"reduce-overhead"``: each distinct step of the plan is recorded as one CUDA graph and replayed. How many
            tokens are selected is rounded up to at most 8 different numbers a plan, and the caches stay allocated until
            ``reset()``. What cannot be recorded runs as without, and a warning says why: a policy with a threshold, a
            model in several graphs or on several devices, a CPU. Not run on a GPU yet: tested on a recorder that
            replays ops on the CPU. ``"default"``: no graphs.

    Raises:
        TocaError: ``model`` is no module and no pipeline with a transformer, or an option, the lowering or the mode is
            unknown.
        PolicyError: ``policy`` is no policy.
    """
    if is_pipeline(model):
        found = transformers_of(model)
        if not found:
            raise TocaError(f"{type(model).__name__} has no transformer to optimise; pass the model itself")
        return attach(model, {name: convert(part, _session(policy, options)) for name, part in found.items()})
    if not isinstance(model, nn.Module):
        raise TocaError(f"optimize takes a torch.nn.Module or a diffusers pipeline, not {type(model).__name__}")
    return wrap(model, _session(policy, options))


def _session(policy: Policy | str, options: Mapping[str, Any]) -> Session:
    unknown = ", ".join(repr(name) for name in options if name not in Options.__annotations__)
    if unknown:
        known = ", ".join(Options.__annotations__)
        raise TocaError(f"optimize and enable_cache have no option {unknown}; there are {known}, beside the policy")
    return Session(policy, **cast(Options, options))


def enable_cache(model: Any, policy: Policy | str = "balanced", **options: Any) -> Any:
    """``optimize`` in place, for a pipeline and for a bare model: the model stays the object that it is.

    Args:
        model: a diffusion transformer in eval mode, or a diffusers pipeline with one.
        policy, options: as in ``optimize``.

    Returns:
        ``model`` itself, or the model inside where it is a wrapper of ``torch.compile`` or ``optimize``.

    Raises:
        TocaError, PolicyError: as ``optimize``, or an object cannot be optimised in place.
    """
    if is_pipeline(model) or not isinstance(model, nn.Module):
        return optimize(model, policy, **options)
    return convert(model, _session(policy, options))._model


def disable_cache(model: Any) -> Any:
    """Undo ``optimize`` and ``enable_cache``. What was never optimised stays as it is.

    Args:
        model: a pipeline, or an optimised model.

    Returns:
        The pipeline or model, as it was before: the same objects, of the same classes.

    Raises:
        TocaError: it is neither a pipeline nor a module.
    """
    if is_pipeline(model):
        return detach(model)
    if not isinstance(model, nn.Module):
        raise TocaError(f"restore takes what optimize returned, not {type(model).__name__}")
    plain = revert(model)
    tidy()
    return plain


restore = disable_cache


def is_optimized(model: Any) -> bool:
    """Whether calls of a model, or of a pipeline's transformer, are cached."""
    return bool(optimized_components(model)) if is_pipeline(model) else handle_of(model) is not None


def controls(model: Any) -> Controls:
    """What is seen and said of a model's caching, however it came to it: ``steps``, ``policy`` (which may be assigned),
    ``reset()``, ``cache_context(…)``, ``cache_bytes`` and ``fresh_tokens()``.

    Args:
        model: as of ``explain``. An optimised model has these as attributes, too.

    Raises:
        TocaError: it is no such model.
    """
    return SessionControls(next(iter(_subjects(model, "controls").values())).session)


def explain(model: Any) -> Report:
    """What the compiler found and decided, and what it expects of the policy. ``str(report)`` is a table. Before the
    first call it knows the policy alone, and says so.

    Args:
        model: what ``optimize`` returned (of a pipeline, each transformer has a section), or
            ``torch.compile(model, backend="toca", …)`` after its first call.

    Raises:
        TocaError: it is no such model.
    """
    return Report(_subjects(model, "explain"))


def summary(model: Any) -> Summary:
    """What the calls of the last sampling did: steps by kind, what they took, and what was saved. ``str(summary)`` is a
    table, ``summary.as_dict()`` is for JSON.

    Args:
        model: as for ``explain``; of a pipeline, ``summary.transformers`` has one for each transformer.

    Raises:
        TocaError: it is no such model.
    """
    return summarise(_subjects(model, "summary"))


def _subjects(model: Any, wanted: str) -> dict[str, Subject]:
    """The optimised models behind an object, by the names of a pipeline's components."""
    if is_pipeline(model):
        parts: dict[str, Any] = dict(transformers_of(model))
    else:
        parts = {"": model}
    found = {}
    for name, component in parts.items():
        handle = handle_of(component)
        part: Any = component if handle is None else handle  # no `or`: torch's wrapper has a length that may raise
        session = _session_of(part)
        if session is not None:
            inner = part._model if isinstance(part, Handle) else getattr(part, "_orig_mod", part)
            forward = getattr(inner, "forward", inner)
            found[name] = Subject(session, type(inner).__name__, tuple(inspect.signature(forward).parameters))
    if not found:
        raise TocaError(
            f"{wanted} takes a model or a pipeline optimised by toca_compile (torch.compile's after its first call)"
        )
    return found


def _session_of(part: Any) -> Session | None:
    if isinstance(part, Handle):
        return part._session
    callback: Any = getattr(getattr(part, "dynamo_ctx", None), "callback", None)
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    session: Session | None = getattr(callback, "_toca_session", lambda: None)()
    return compiled_session(part) if session is None else session


__all__ = [
    "Controls",
    "OptimizedModel",
    "controls",
    "disable_cache",
    "enable_cache",
    "explain",
    "is_optimized",
    "optimize",
    "restore",
    "summary",
]
