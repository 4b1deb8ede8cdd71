"""StepState: what a step that is one graph (``compiler/emit_step.py``) knows of its run, as the buffers that it reads
and changes: ``step`` ``[1]``, ``past`` of a plan that decides at run time, and the caches by number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toca_compile.ir.history import Past

StepState = dict[str, Tensor]


def begun(caches: Sequence[Tensor], step: int, past: Past, order: int | None, device: torch.device) -> StepState:
    """The buffers of a run that is about to do a step.

    Args:
        order: of what is kept of blocks that a step may skip; None where none does.
    """
    state = {f"cache{i}": cache for i, cache in enumerate(caches)}
    with torch.inference_mode(False):
        state["step"] = torch.full((1,), step, dtype=torch.int64, device=device)
        if order is not None:
            kept = order + 1
            told = [*[0] * kept, *past.full][-kept:]
            state["past"] = torch.tensor([past.times, *told], device=device)
    return state


def computed(state: StepState, past: Past) -> bool:
    """Whether the last step computed what it could skip. The one read of a device value."""
    return "past" not in state or int(state["past"][0]) > past.times
