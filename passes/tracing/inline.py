"""Inline: Dynamo's graph run node by node, so that what tracing sees is one graph of tensor ops.

Graphs inside the graph (checkpoints) run as if they stood in it, what ``torch.autocast`` in it casts is spelled out,
and so is what ``torch.vmap`` maps (``transforms.py``).
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils import _pytree as pytree

from toca_compile.errors import UnsupportedGraphError
from toca_compile.ir.calls import tensors
from toca_compile.ir.graph import source_line
from toca_compile.ops import flex
from toca_compile.passes.tracing.transforms import begins, spelled_out
from toca_compile.rules.registry import Work, work_of

higher_order = torch.ops.higher_order

_CAST = {Work.CONTRACT, Work.ATTENTION}

# What runs a graph inside the graph, and where among its arguments those of that graph begin. Without gradients a
# checkpoint means nothing else.
_INNER = {higher_order.tag_activation_checkpoint: 1, higher_order.invoke_subgraph: 2}


class Inlining(fx.Interpreter):
    """Runs graphs inside the graph as if they stood in it, and spells out what ``torch.autocast`` in it casts: an op
    whose result Dynamo saw in another dtype than its operands give had them cast to that one."""

    def __init__(self, module: fx.GraphModule, casting: Sequence[bool] = ()) -> None:
        super().__init__(module)
        self.casting = list(casting)  # whether each autocast that is open, the innermost last, casts
        self.dtype: torch.dtype | None = None  # what operands are cast to

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _enter_autocast:
            self.casting.append(_casts(n.args))
            return None
        if n.target is _exit_autocast:
            return self.casting.pop() and None
        if n.target is higher_order.flex_attention and any(use.args[1] and use.users for use in n.users):
            raise UnsupportedGraphError(
                f"flex attention is asked for more than its result ({source_line(n)}): without return_lse and "
                "return_aux it can be cached"
            )
        if begins(n):
            return self._transform(n)
        seen = next(iter(tensors(n.meta.get("example_value"))), None)
        if not any(self.casting[-1:]) or n.op not in ("call_function", "call_method") or seen is None:
            return super().run_node(n)
        try:
            with _quiet():
                result = super().run_node(n)
            if next(iter(tensors(result))).dtype == seen.dtype:
                return result
        except RuntimeError:  # the operands' dtypes do not go together
            pass
        self.dtype = seen.dtype
        try:
            return super().run_node(n)
        finally:
            self.dtype = None

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def cast(value: Any) -> Any:
            return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        found = super().fetch_args_kwargs_from_env(n)
        return found if self.dtype is None else pytree.tree_map(cast, found)

    def _transform(self, begin: fx.Node) -> None:
        """Run what stands for a transform; its nodes count as run."""
        graph, taken, nodes = spelled_out(begin, self.env)
        if graph is not None and any(self.casting[-1:]) and any(work_of(n) in _CAST for n in graph.graph.nodes):
            raise UnsupportedGraphError(
                f"the model multiplies matrices in torch.vmap under torch.autocast ({source_line(begin)}), whose casts "
                "cannot be traced there: leave torch.autocast for it"
            )
        made = [] if graph is None else Inlining(graph).run(*(self.env[n] for n in taken))
        self.env.update(dict.fromkeys(nodes) | dict(zip(nodes, made, strict=False)))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.Tensor and isinstance(args[0], torch.Tensor):  # Dynamo's word for one without its subclass
            return args[0].detach()
        if target is higher_order.flex_attention:
            others, name = flex.named(args[3:])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "At pre-dispatch tracing")  # that a composite of ours is functional
                # Inside a checkpoint the two results that are refused above may be asked for in vain.
                return torch.ops.toca.flex_attention.default(*args[:3], others, name), None, None
        if target in _INNER:
            return Inlining(args[0], self.casting).run(*args[_INNER[target] :])
        return super().call_function(target, args, kwargs)


def _casts(arguments: Any) -> bool:
    """Whether an autocast in the graph casts, by its device, dtype and switch.

    Raises:
        UnsupportedGraphError: the call itself stands under another one, which would cast all the same.
    """
    device, dtype, enabled, *_ = arguments
    around = torch.is_autocast_enabled(device)
    if around and not (enabled and dtype in (None, torch.get_autocast_dtype(device))):
        raise UnsupportedGraphError(
            "the model is called under torch.autocast and switches it off or to another dtype for a part of it, which "
            "cannot be traced: open torch.autocast inside forward alone, or call the model without"
        )
    return bool(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report of an op that fails: the operands may be about to be cast."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
