"""The last line of defence: a partial variant is run against its dense meaning on random values.

The proof rests on the rules; a wrong rule makes a wrong proof. With ``TOCA_VERIFY=1`` (always on in the tests) every
partial variant is executed once with random inputs, beside the variant that computes all tokens and blends by mask.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from toca_compile.errors import VerifyError
from toca_compile.ir import ops as toca_ops
from toca_compile.ir.program import Variant

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def enabled() -> bool:
    """Whether ``TOCA_VERIFY`` asks for the check."""
    return os.environ.get("TOCA_VERIFY", "0") not in ("", "0")


def check_partial(
    variant: Variant, dense: Variant, examples: dict[Any, Any], names: Sequence[str], *, shared_pair: bool = False
) -> None:
    """Compare results and changed buffers of a partial variant and its dense meaning.

    Args:
        examples: fake tensor or number for each input number and slot.
        names: the sites, for the message.
        shared_pair: both halves of the batch have the same scores.

    Raises:
        VerifyError: they differ.
    """
    if any(isinstance(e, torch.Tensor) and e.device.type == "meta" for e in examples.values()):
        return
    generator = torch.Generator().manual_seed(0)
    values = {key: _random(e, key, generator, shared_pair) for key, e in examples.items()}
    ends = []
    with torch.inference_mode(False), torch.no_grad():
        for v in (variant, dense):
            inputs = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in values.items()}
            keys = [*v.values, *v.slots]
            outputs = v.module(*[inputs[k] for k in keys])
            ends.append([*outputs, *(inputs[s] for s in variant.slots if isinstance(inputs[s], torch.Tensor))])
    for ours, meant in zip(*ends, strict=True):
        tolerance = _TOLERANCE.get(ours.dtype, 0.0)
        if not torch.allclose(ours.double(), meant.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
            raise VerifyError(
                f"a partial step of {', '.join(names)} is not its dense meaning (largest difference "
                f"{(ours.double() - meant.double()).abs().max():.3g}): the rule of one of its ops is wrong"
            )


def _random(example: Any, key: Any, generator: torch.Generator, shared_pair: bool) -> Any:
    if not isinstance(example, torch.Tensor):
        return example
    if not example.dtype.is_floating_point:
        return torch.zeros(example.shape, dtype=example.dtype, device=example.device)
    value = torch.randn(example.shape, generator=generator).to(example.dtype).to(example.device)
    if getattr(key, "kind", "") not in ("score", "scores of"):
        return value
    # No score is negative; a selection is only compared where both variants make the same one.
    return toca_ops.pair_mean(value.abs()) if shared_pair else value.abs()
