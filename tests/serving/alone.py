"""Requests that sample a model called as ``model(x, t, y)``, or as FLUX is, and what comes of one that runs alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import toca_compile
from tests.sampling import gaussian, noise
from toca_compile import Request
from toca_compile.serving.requests import Sampling, call, meant


def positional(request: Request) -> Sampling:
    """Euler steps of ``model(x, t, y)``, with guidance as a pair."""
    x, steps, rows = request.noise(), request.num_steps, 2 if request.guided else 1
    y: Tensor = request.conditioning["y"]
    y = torch.cat([torch.full_like(y, 10), y])[-rows:]
    for i in range(steps):
        t = torch.full((rows,), (steps - 1 - i) * 1000 // steps)
        answer = yield call(torch.cat([x] * rows), t, y)
        x = x - request.guided_by(answer)[:, : x.shape[1]] / steps
    return x


def picture(seed: int, num_steps: int = 8, guidance: float | None = None) -> Request:
    """A request for a picture of a class."""
    return Request(
        noise(1, seed=seed), {"y": torch.tensor([seed % 10])}, num_steps, guidance, seed=seed, sampler=positional
    )


def words_and_patches(seed: int, num_steps: int = 8, words: int = 5) -> Request:
    """A request as FLUX takes them: 12 patches, their positions the same for all."""
    ids = torch.zeros(3, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(3)[:, None], torch.arange(4)[None]
    given = {
        "encoder_hidden_states": gaussian(1, words, 12, seed=100 + seed),
        "pooled_projections": gaussian(1, 12, seed=200 + seed),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(words, 3),
    }
    return Request(gaussian(1, 12, 16, seed=seed), given, num_steps, seed=seed)


class Alone:
    """What requests come to when each runs alone, by a model optimised for it; traced once for all."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.opt = toca_compile.optimize(model, "balanced", lowering="eager")
        self.known: dict[Any, Tensor] = {}

    def __call__(self, request: Request, policy: Any, key: Any = None) -> Tensor:
        """The result; ``key`` tells like requests."""
        if key is None or key not in self.known:
            result = self._run(request, policy)
            if key is None:
                return result
            self.known[key] = result
        return self.known[key]

    def _run(self, request: Request, policy: Any) -> Tensor:
        sampling = request.sampler(request)
        with torch.no_grad():
            try:
                given = next(sampling)
                self.opt.policy = meant(policy, request, given)
                self.opt.reset()
                while True:
                    given = sampling.send(self.opt(*given.args, **given.kwargs))
            except StopIteration as done:
                result: Tensor = done.value
                return result


def same(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the largest number."""
    bound = 1e-5 * float(theirs.abs().max().clamp(min=1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def failing(request: Request, at: int, error: Callable[[], Exception]) -> Request:
    """The same, whose sampler fails at a step."""

    def sampler(given: Request) -> Sampling:
        own, answer = request.sampler(request), None
        for _ in range(at):
            answer = yield own.send(answer)
        raise error()

    return replace(request, sampler=sampler)
