"""Wrappers: what an op on a wrapper tensor does with the plain ones inside, traced.

A wrapper says so itself, in its ``__torch_dispatch__``. A distributed tensor, of which each process has a part, does it
in C++, behind which tracing does not see: its dispatcher is asked in Python which parts the op needs, what is to be
sent for them, and which part of the result comes of it.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes


def dispatched(
    mode: AbstractContextManager[Any],
    wrapper: Any,
    op: Any,
    types: Sequence[Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """The result of an op on tensors of the class ``wrapper``; ``mode`` sees what is done with the plain ones."""
    dispatcher = getattr(wrapper, "_op_dispatcher", None)
    if dispatcher is None:
        with mode:
            return wrapper.__torch_dispatch__(op, types, args, kwargs)
    if op in dispatcher._custom_op_handlers:
        with mode:
            return dispatcher._custom_op_handlers[op](op, args, kwargs)
    info = dispatcher.unwrap_to_op_info(op, args, kwargs)
    with _disable_current_modes():  # it works out shapes by running the op on values of its own
        info.output_sharding = dispatcher.sharding_propagator.propagate_op_sharding_non_cached(info.schema)
    with mode:
        results = dispatcher._dispatch_get_local_results_slow_path(op, args, info)
    return dispatcher.wrap(results, info.output_sharding.output_spec)
