"""Models that tests share: tracing one is nearly all that a small test costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import toca_compile
from tests.models import randomize
from toca_compile import FullCompute

FULL = FullCompute()


class Traced:
    """Gives a model by what makes it and its settings, and it optimised: traced once for the policies, lowerings and
    weights of all tests, and to each as if it were the first. A test that changes more of a model makes one of its own."""

    def __init__(self) -> None:
        self.made: dict[Any, tuple[Any, Any]] = {}

    def __call__(
        self,
        kind: Callable[..., nn.Module],
        policy: Any = FULL,
        *,
        lowering: str = "eager",
        which: int = 0,
        **settings: Any,
    ) -> tuple[Any, Any]:
        """The model, with the weights of ``randomize``, and it optimised. ``which``: of several, where one is held
        against another."""
        key = (kind, which, *sorted(settings.items()))
        if key not in self.made:
            model = kind(**settings)
            self.made[key] = model, toca_compile.optimize(model, FULL, lowering=lowering)
            torch.manual_seed(0)  # as it is where the model is there already
        model, opt = self.made[key]
        opt.reset()
        opt.policy, opt.lowering = policy, lowering
        return randomize(model), opt
