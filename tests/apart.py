"""A stand-in for an accelerator: of tensors that are no ``OnHost`` the host does not see the numbers, and none may be
read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from toca_compile import diffusers, session
from toca_compile.runtime import conditioning, host_known, sight, step_control, times
from toca_compile.runtime.host_known import HostKnown

_READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")


class OnHost(Tensor):
    """A tensor of the host; so is what is made of it."""


def _on_host(value: Any) -> bool:
    return isinstance(value, OnHost)


def _read(values: Tensor) -> Tensor:
    return values.clone().as_subclass(OnHost)


@contextmanager
def apart() -> Iterator[None]:
    """All tensors lie elsewhere; what is read on purpose (``host_known.read``) is the host's."""
    with patch.object(host_known, "read", _read):
        for module in (diffusers, session, conditioning, host_known, sight, step_control, times):
            patch.object(module, "on_host", _on_host).start()
        try:
            yield
        finally:
            patch.stopall()


@contextmanager
def unread() -> Iterator[None]:
    """Whoever reads a number that is not the host's fails."""

    def refusing(name: str) -> Any:
        before = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            known = name in host_known._READ and isinstance(self, HostKnown) and self.host is not None
            assert known or isinstance(self, OnHost), f"the host waits for a number ({name})"
            return before(self, *args, **kwargs)

        return read

    found = [patch.object(Tensor, name, refusing(name)) for name in _READS]
    for one in found:
        one.start()
    try:
        yield
    finally:
        for one in found:
            one.stop()
