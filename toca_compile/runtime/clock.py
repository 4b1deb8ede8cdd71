"""How long a step takes, without waiting for it: on an accelerator two events are recorded, and read when asked for."""

import time
from collections.abc import Iterable
from typing import Any

import torch


class Clock:
    """Runs from when it is made until ``stop``.

    Args:
        device: where the work is done; on the CPU it is done when a call returns, so the host's clock tells.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if _has_events(device) else None
        self._began = self._ended = self._now()

    def stop(self) -> None:
        """The work was given to the device."""
        self._ended = self._now()

    @property
    def is_over(self) -> bool:
        """Whether the work is done, so that ``seconds`` waits for nothing."""
        return self._device is None or bool(self._ended.query())

    @property
    def seconds(self) -> float:
        """What the work took. On an accelerator this waits until it is done."""
        if self._device is None:
            return float(self._ended - self._began)
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1e3

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event


def device_of(values: Iterable[Any]) -> torch.device:
    """Where a call computes: the first device of its tensors that is not the host."""
    found = [v.device for v in values if isinstance(v, torch.Tensor)]
    return next((d for d in found if d.type != "cpu"), torch.device("cpu"))


def _has_events(device: torch.device) -> bool:
    """Whether events tell the time there. Those that a CUDA graph captures are never recorded."""
    if device.type in ("cpu", "meta"):
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
