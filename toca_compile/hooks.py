"""Hooks: what diffusers and accelerate put around the forward of a model and of its layers.

Both replace ``forward`` on the object: it stands in the module's ``__dict__``. What runs there is traced like any other
code, where it can be. Here is what must be known beforehand: hooks that keep values from step to step, and weights that
are there only while a layer runs. Neither library is imported.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# How to do without the hooks that are met most, by their classes.
_REMEDIES = {
    "GroupOffloadingHook": "offload by offload_type='block_level' or enable_model_cpu_offload()",
    "AlignDevicesHook": "offload by enable_model_cpu_offload() or enable_group_offload(offload_type='block_level')",
}


@dataclass(frozen=True)
class Hooked:
    """A module whose ``forward`` is not its class's, and the classes of what stands around it."""

    path: str
    module: nn.Module
    hooks: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The hooks as a user knows them."""
        return tuple(dict.fromkeys(type(hook).__name__ for hook in self.hooks)) or (
            _name(vars(self.module)["forward"]),
        )


def hooked(model: nn.Module) -> list[Hooked]:
    """Those of a model's modules that have a ``forward`` of their own."""
    return [Hooked(path, m, _hooks(m)) for path, m in model.named_modules() if "forward" in vars(m)]


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    found = list(getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values())
    outer = vars(module).get("_hf_hook")
    found += getattr(outer, "hooks", [outer]) if outer is not None else []
    return tuple(found)


def _name(forward: Any) -> str:
    function = getattr(forward, "__wrapped__", getattr(forward, "func", forward))
    return str(getattr(function, "__qualname__", type(function).__name__))


def why_untraced(name: str, found: Sequence[Hooked]) -> str | None:
    """Why a model with these hooks must be called as it is; None where it may be traced. ``name``: the model's."""
    for one in found:
        for hook in one.hooks:
            if getattr(hook, "_is_stateful", False):
                return (
                    f"{name} has a cache of its own ({type(hook).__name__} on {one.path or 'the model'}), and of two "
                    "caches each would take what the other reuses for computed. Switch it off by disable_cache(), as "
                    "it was before enable_cache(…)"
                )
            config = getattr(hook, "parallel_config", None)
            uneven = [x for x in ("ulysses_anything", "ring_anything") if getattr(config, x, False)]
            if uneven:
                return (
                    f"{name} is parted by {type(hook).__name__} on {one.path or 'the model'} with {uneven[0]}=True, by "
                    "which processes ask each other at each call how many tokens they have, and no graph holds that: "
                    "leave it out, and give it as many tokens as the processes divide"
                )
        if any(p.is_meta for p in one.module.parameters(recurse=False)):
            return (
                f"the weights of {one.path or name} are there only while that layer runs, brought in by "
                f"{' and '.join(one.names)}, so that {name} cannot be traced as a whole: {remedy(one.names)}"
            )
    return None


def why_no_site(found: Sequence[Hooked]) -> str:
    """What to say of the hooks of a model in which nothing was found to cache; nothing where there are none."""
    names = dict.fromkeys(name for one in found if one.path for name in one.names)
    if not names:
        return ""
    first = next(one.path for one in found if one.path)
    return (
        f"Its layers have hooks ({', '.join(names)}; the first on {first}), and what they do may not be traced: "
        f"{remedy(tuple(names))}"
    )


def brought_in(model: nn.Module) -> str:
    """Which modules within a model ``fully_shard`` brings the weights of, as a sentence; nothing where it is none."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    paths = [path for path, module in model.named_modules() if path and isinstance(module, sharded)]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"the hooks of fully_shard, which bring in the weights of {paths[0]}{more}, are not traced (shard whole "
        "blocks, or the whole model alone, so that they stand around branches)"
        if paths
        else ""
    )


def remedy(names: Sequence[str]) -> str:
    """How to do without these hooks."""
    known = dict.fromkeys(_REMEDIES[name] for name in names if name in _REMEDIES)
    return "; ".join(known) or "remove them, or put them around the whole model"


class _Cast:
    """A layer whose weights are seen in another dtype than they are stored in."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self, *args, **kwargs)


def _casts(one: Hooked) -> Any:
    """What a layer does that is stored in one dtype and computes in another, without changing its weights on the way;
    None where that is not all that its hooks do."""
    if [type(hook).__name__ for hook in one.hooks] != ["LayerwiseCastingHook"] or list(one.module.children()):
        return None
    return _Cast(one.module, one.hooks[0].compute_dtype).forward


class Traceable:
    """The modules of a model whose hooks change weights in place, which a graph cannot, and what does the same without.

    Dynamo tells by the functions themselves whether it has seen them, so they are made once.
    """

    def __init__(self, found: Sequence[Hooked]) -> None:
        pairs = [(vars(one.module), _casts(one)) for one in found]
        self._pairs = [(own, instead) for own, instead in pairs if instead is not None]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """While the model is called: they stand in for the hooks."""
        before = [own["forward"] for own, _ in self._pairs]
        for own, instead in self._pairs:
            own["forward"] = instead
        try:
            yield
        finally:
            for (own, _), forward in zip(self._pairs, before, strict=True):
                own["forward"] = forward
