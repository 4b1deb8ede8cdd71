"""Short samplings step by step, at times of one's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import toca_compile
from tests.sampling import noise
from toca_compile import FullCompute, ToCa

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


@torch.no_grad()
def same_as_dense(
    model: nn.Module, policies: Sequence[Any], inputs: Sequence[tuple[Any, ...]], look: Callable[[Any], None]
) -> Any:
    """Full steps are the model, bit by bit. Under each policy a restricted graph is its dense meaning at changing
    ``inputs``, one a step, after which ``look`` may look at it; and the plain model at inputs that stay. Returns the
    optimised model."""
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager")
    plain = model(*inputs[0])
    assert torch.equal(opt(*inputs[0]), plain)
    for policy in policies:
        opt.policy = policy
        for out, meant in zip(*both_ways(opt, lambda opt: [opt(*given) for given in inputs]), strict=True):
            torch.testing.assert_close(out, meant, rtol=1e-4, atol=1e-4)
        look(opt)
        opt.reset()
        for _ in inputs:
            torch.testing.assert_close(opt(*inputs[0]), plain, rtol=1e-4, atol=1e-4)
    return opt


def both_ways(opt: Any, run: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What a run gives, and what it gives by the graphs' dense meaning, of one trace. The last run is the first of
    them."""
    opt.lowering = "dense"
    dense = run(opt)
    opt.lowering = "eager"
    return run(opt), dense
