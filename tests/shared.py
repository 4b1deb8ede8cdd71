"""Models that tests share: tracing one is nearly all that a small test costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo.utils import orig_code_map

import toca_compile
from tests.models import randomize
from toca_compile import FullCompute
from toca_compile.traced import _entry

FULL = FullCompute()


def empty_dynamo() -> None:
    """``torch._dynamo.reset``, after which optimised models that are alive stay traced: what Dynamo keeps of each hangs on
    code objects of its own, and goes with them."""

    def is_own(code: Any) -> bool:
        return code is not None and (code.co_filename, code.co_name) == (_entry.__code__.co_filename, _entry.__name__)

    kept = []
    for tracker in (convert_frame.input_codes, convert_frame.output_codes):
        kept += [(tracker, code) for code in (weak() for weak in tracker.seen) if is_own(code)]
        tracker.seen[:] = [weak for weak in tracker.seen if not is_own(weak())]
    made_of = [(code, orig_code_map[code]) for _, code in kept if code in orig_code_map]
    torch._dynamo.reset()
    for code, original in made_of:
        orig_code_map[code] = original
    for tracker, code in kept:
        tracker.add(code)


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
