"""The last line of defence: a partial variant is run against its dense meaning on random values.

The proof rests on the rules; a wrong rule makes a wrong proof. So the first partial variant of each template is
executed once with random inputs, on the model's own device, beside the variant that computes all tokens and blends by
mask. ``TOCA_VERIFY=0`` leaves that out, ``TOCA_VERIFY=all`` does it for every partial variant.
"""

import os
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch

from toca_compile.errors import TocaError, VerifyError
from toca_compile.ir.calls import tensors
from toca_compile.ir.program import Variant
from toca_compile.ir.state import State
from toca_compile.ops import scores

_TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.complex64: 1e-3,
}  # fmt: skip


class Checks(Enum):
    """Which partial variants are checked."""

    NONE = "0"
    FIRST = "1"
    ALL = "all"


def wanted() -> Checks:
    """What ``TOCA_VERIFY`` asks for: the first of each template where it says nothing.

    Raises:
        TocaError: it is none of 0, 1 and all.
    """
    asked = os.environ.get("TOCA_VERIFY") or "1"
    if asked not in [c.value for c in Checks]:
        raise TocaError(f"TOCA_VERIFY is 0 (off), 1 (first variant of each template) or all, not {asked!r}")
    return Checks(asked)


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
    devices = {e.device for e in examples.values() if isinstance(e, torch.Tensor)}
    generators = {device: torch.Generator(device).manual_seed(0) for device in devices}
    values = {key: _random(e, key, generators, shared_pair) for key, e in examples.items()}
    # A double is no more exact than the step inside the branch (rotary angles, say) that is single.
    made = {value.dtype for n in variant.module.graph.nodes for value in tensors(n.meta.get("val"))}
    single = bool(made & {torch.float32, torch.complex64})
    ends = []
    with torch.inference_mode(False), torch.no_grad():
        for v in (variant, dense):
            # Buffers are changed in place: each variant has its own.
            own = {s: values[s].clone() for s in v.slots if isinstance(values[s], torch.Tensor)}
            inputs = {**values, **own}
            outputs = v.module(*[inputs[k] for k in (*v.values, *v.slots)])
            ends.append([*outputs, *(inputs[s] for s in variant.slots if isinstance(inputs[s], torch.Tensor))])
    for ours, meant in zip(*ends, strict=True):
        tolerance = _TOLERANCE.get(ours.dtype, 0.0)
        if single and tolerance:
            tolerance = max(tolerance, _TOLERANCE[torch.float32])
        exact = torch.complex128 if ours.is_complex() else torch.float64
        ours, meant = ours.to(exact), meant.to(exact)
        # Rounding is relative to the terms of a sum, not to what is left of them.
        size = max(1.0, float(meant.abs().nan_to_num(0, 0, 0).max())) if meant.numel() else 1.0
        if not torch.allclose(ours, meant, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            raise VerifyError(
                f"a partial step of {', '.join(names)} is not its dense meaning (largest difference "
                f"{(ours - meant).abs().max():.3g}): the rule of one of its ops is wrong"
            )


def _random(example: Any, key: Any, generators: dict[torch.device, torch.Generator], shared_pair: bool) -> Any:
    if not isinstance(example, torch.Tensor):
        return example
    made: dict[str, Any] = {"generator": generators[example.device], "device": example.device}
    if example.dtype == torch.bool:
        return torch.rand(example.shape, **made) > 0.3
    if not (example.dtype.is_floating_point or example.dtype.is_complex):
        # Indices, perhaps: 0 and 1 are legal in any dimension worth an index, and tell rows apart.
        return torch.randint(0, 2, example.shape, dtype=example.dtype, **made)
    wide = torch.complex64 if example.dtype.is_complex else torch.float32
    value = torch.randn(example.shape, dtype=wide, **made)
    if example.dim() > 1:
        # As trained weights are: what a wide layer makes of them stays within half precision.
        value *= min(1.0, 2.0 * max(example.shape[-1], 1) ** -0.5)
    value = value.to(example.dtype)
    if getattr(key, "kind", None) not in (State.SCORE, State.SOURCE_SCORE):
        return value
    # No score is negative; a selection is only compared where both variants make the same one.
    return scores.pair_mean(value.abs()) if shared_pair else value.abs()
