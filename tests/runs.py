"""Short samplings step by step, at times of one's own."""

from typing import Any

import torch
from torch import Tensor, nn

import toca_compile
from tests.sampling import noise
from toca_compile import ToCa

STEPS = 8
POLICY = ToCa(num_steps=STEPS, interval=4, fresh_ratio=0.3, schedule="constant")
TIMES = [875, 750, 625, 500, 375, 250, 125, 0]


def optimized(model: nn.Module, policy: Any = POLICY, **options: Any) -> Any:
    """The optimised model, lowered to what runs without a compiler."""
    return toca_compile.optimize(model, policy, lowering="eager", **options)


def steps(model: Any, x: Tensor, times: list[int], y: Tensor | None = None, shape: Any = (2,)) -> Tensor:
    """Euler steps at these times."""
    y = torch.arange(x.shape[0]) if y is None else y
    with torch.no_grad():
        for t in times:
            x = x - model(x, torch.full(shape, t), y)[:, : x.shape[1]] / STEPS
    return x


def kinds(opt: Any) -> str:
    """The steps of the last sampling, a letter each."""
    return "".join(r.kind.value[0] for r in opt.steps)


def called(opt: Any) -> Any:
    """The model after two steps."""
    steps(opt, noise(), TIMES[:2])
    return opt
