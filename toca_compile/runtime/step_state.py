"""StepState: what a step that is one graph (``compiler/emit_step.py``) knows of its run, as the buffers that it reads
and changes: ``step`` ``[1]``, of a plan that decides at run time ``past`` and what adds up, ``drift``, and the caches
by number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toca_compile.ir.history import Past
from toca_compile.ir.table import Test

StepState = dict[str, Tensor]


def begun(caches: Sequence[Tensor], step: int, past: Past, test: Test | None, device: torch.device) -> StepState:
    """The buffers of a run that is about to do a step.

    Args:
        test: what decides whether it skips blocks; None where nothing does.
    """
    state = {f"cache{i}": cache for i, cache in enumerate(caches)}
    with torch.inference_mode(False):
        state["step"] = torch.full((1,), step, dtype=torch.int64, device=device)
        if test is not None:
            kept = test.skip.memory.depth + 1
            told = [*[0] * kept, *past.full][-kept:]
            state["past"] = torch.tensor([past.times, *told], device=device)
        if test is not None and test.skip.gate.adds_up:
            state["drift"] = torch.zeros(1, dtype=torch.float64, device=device)
    return state


def computed(state: StepState, past: Past) -> bool:
    """Whether the last step computed what it could skip. The one read of a device value."""
    return "past" not in state or int(state["past"][0]) > past.times
