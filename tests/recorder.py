"""A CUDA graph on the CPU: the ops of a call, recorded with their memory, and repeated there without any Python.

As on a GPU, numbers of the host that went into an op stay what they were, an input that comes to lie elsewhere is not
seen, and what was made lies where it lay. Beyond a GPU it *says* what is wrong, where that would crash or read anything:
a value that the host waits for, a shape that follows from values, memory that is gone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")
aten = torch.ops.aten

_SYNC = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class GraphError(RuntimeError):
    """A call cannot be a graph, or a graph can no longer be replayed."""


class Recorder:
    """Stands in for ``CudaGraphs``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: list[Recording] = []
        self.warm = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        with nullcontext():
            yield

    def warm_up(self, call: Callable[[], T]) -> T:
        self.warm += 1
        return call()

    def capture(self, call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        recording = Recording()
        try:
            with torch.inference_mode(False), torch.no_grad(), recording:
                made = call()
        finally:
            recording.undo()
        recording.end()
        self.graphs.append(recording)

        def replay() -> Sequence[Tensor]:
            recording.replay()
            return made

        return replay


class Outside:
    """A tensor that a graph did not make: where it lies, without keeping it alive."""

    def __init__(self, value: Tensor) -> None:
        self.storage, self.address = StorageWeakRef(value.untyped_storage()), value.untyped_storage().data_ptr()
        self.like = value.dtype, value.storage_offset(), tuple(value.shape), value.stride()

    def tensor(self) -> Tensor:
        """It, if it is still there."""
        storage = None if self.storage.expired() else torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.data_ptr() != self.address:
            raise GraphError(f"a graph reads memory that is gone: {self.like}")
        dtype, offset, shape, stride = self.like
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


class Recording(TorchDispatchMode):
    """The ops of a call, and the tensors that they were given and made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self._made: set[int] = set()  # storages
        self._known: dict[int, Tensor] = {}  # tensors that are not made here, until the end
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory from outside that the call changes, as it was

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args):
            raise GraphError(f"{func} waits for a value on the device")
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for value in (x for x in tree_leaves(given) if isinstance(x, Tensor)):
                    self._save(value)
        out = func(*args, **kwargs)
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self._made.update(s for s in map(_storage, made) if s not in given)
        self.calls.append((func, args, kwargs, out))
        return out

    def _save(self, value: Tensor) -> None:
        storage = _storage(value)
        if storage not in self._made and storage not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            self._before[storage] = whole, whole.clone()

    def undo(self) -> None:
        """Recording does nothing: what was changed is as it was."""
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()

    def end(self) -> None:
        """Let go of what was not made here."""

        def told(value: Any) -> Any:
            return Outside(value) if isinstance(value, Tensor) and _storage(value) not in self._made else value

        self.calls = [(func, *(tree_map(told, part) for part in parts)) for func, *parts in self.calls]

    def replay(self) -> None:
        """The same ops on the same memory."""
        self.replays += 1
        with torch.inference_mode(False), torch.no_grad():
            for func, *parts in self.calls:
                args, kwargs, out = (tree_map(lambda x: x.tensor() if isinstance(x, Outside) else x, p) for p in parts)
                given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and _storage(old) not in given:
                        old.copy_(new)


def _waits(func: Any, args: Any) -> bool:
    """Whether the host must know a value to go on."""
    if func is aten.index.Tensor:  # by a mask, which says how many there are
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return func in (aten._local_scalar_dense.default, aten.equal.default) or any(t in func.tags for t in _SYNC)


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)
