"""One of three processes that share a model and part ways: run by ``spawn.py``.

What each is told is kept, with how long it took. In the end the last process dies in the middle of a sampling.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise
from toca_compile import Fora, ProcessError

SECONDS = 6.0  # the timeout of their group, once all have traced the model
POLICY = Fora(4, 2)


class Averaged(nn.Module):
    """The mean of what all processes have."""

    def forward(self, x: Tensor) -> Tensor:
        return collectives.all_reduce(x, "sum", dist.group.WORLD) / dist.get_world_size()


def model() -> nn.Module:
    """A DiT of one block, whose MLP is shared."""
    model = PlainDiT(depth=1)
    block: Any = model.blocks[0]
    block.mlp.append(Averaged())
    return randomize(model)


def sample(opt: Any, batch: int = 2, steps: int = 4, after: Callable[[int], None] = lambda step: None) -> list[Tensor]:
    """The outputs of a sampling; ``after`` is called after each step."""
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            outputs.append(opt(noise(batch), torch.full((batch,), 900 - 100 * step), torch.arange(batch)))
            after(step)
    return outputs


def said(work: Callable[[], Any]) -> dict[str, Any]:
    """What error a piece of work ends in, and after how many seconds."""
    began, text = time.monotonic(), ""
    try:
        work()
    except ProcessError as error:
        text = str(error)
    return {"error": text, "seconds": time.monotonic() - began}


def main(place: int, count: int) -> dict[str, Any]:
    """All that goes wrong, one after the other."""
    last, plain = place == count - 1, model()
    opt = toca_compile.optimize(plain, POLICY, lowering="eager")
    wanted = sample(opt)
    found: dict[str, Any] = {"alike": said(lambda: sample(opt))}
    opt.policy = Fora(4, 4) if last else POLICY
    found["policies"] = said(lambda: sample(opt))
    opt.policy = POLICY
    found["shapes"] = said(lambda: sample(opt, 3 if place == 1 else 2))
    group: Any = dist.group.WORLD
    group.set_timeout(timedelta(seconds=SECONDS))
    opt.lowering = "dense" if not place else "eager"
    found["settings"] = said(lambda: sample(opt))
    opt.lowering = "eager"
    again = sample(opt)
    found["after"] = max(float((a - b).abs().max()) for a, b in zip(again, wanted, strict=True))
    found["uncached"] = max(float((a - b).abs().max()) for a, b in zip(sample(plain, steps=1), wanted, strict=False))

    def dies(step: int) -> None:
        if last and step:
            os._exit(1)

    dist.barrier()
    found["dead"] = said(lambda: sample(opt, after=dies))
    found["still dead"] = said(lambda: sample(opt))
    return found
    os._exit(0)  # a group that has lost a process does not end well
