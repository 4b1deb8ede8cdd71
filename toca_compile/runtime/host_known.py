"""Timesteps on an accelerator whose numbers the host knows.

A pipeline's timesteps lie where its model is, and to read what the model is told of the time the host would wait until
all work before is done. But they come from the host, by a few ops: what is made of a ``HostKnown`` by these is one
again, with the same ops done on the host. So the host can tell which step a model call is, and what the calls to come
will be told: the same ops on the other timesteps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toca_compile.runtime.sight import is_plain, on_host

# By name, since a method, a function and an operator of one name are the same op.
_MOVES = {"to", "float", "half", "bfloat16", "double", "int", "long", "cuda"}
_VIEWS = {
    "expand", "reshape", "view", "flatten", "ravel", "unsqueeze", "squeeze", "repeat", "repeat_interleave",
    "broadcast_to", "contiguous", "clone", "detach", "cat", "concat", "stack",
}  # fmt: skip
_POINTWISE = {
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "neg", "eq", "ne", "lt", "le",
    "gt", "ge", "__radd__", "__rsub__", "__rmul__", "__rtruediv__", "__rdiv__",
}  # fmt: skip
_FOLLOWED = {
    *_MOVES, *_VIEWS, *_POINTWISE, *(f"__{n}__" for n in ("add", "sub", "mul", "truediv", "div", "neg")),
    *(f"__{n}__" for n in ("eq", "ne", "lt", "le", "gt", "ge")),
}  # fmt: skip
_READ = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__"}
_BY_TYPE = {"__deepcopy__", "__reduce_ex__", "__format__", "__repr__"}  # torch does these otherwise for subclasses

Made = Callable[[Tensor, bool], Tensor]


@dataclass(frozen=True)
class _Origin:
    """Of which timesteps a value was made, of which one of them, and how: of one of them, or of the host's."""

    timesteps: "HostKnown"
    index: int
    made: Made


class HostKnown(Tensor):
    """A tensor, and the same numbers on the host, as long as nobody writes to it.

    Attributes:
        host: its numbers, of the same shape and dtype; what an accelerator's arithmetic makes of them may differ by
            rounding.
    """

    _host: Tensor
    _written: int
    _origin: _Origin | None

    @classmethod
    def of(cls, values: Tensor, host: Tensor | None = None) -> Tensor:
        """A tensor whose numbers the host knows (``host``) or reads now. One made in inference mode stays as it is, and
        so does what is made there of others: of that nobody knows whether it was written to."""
        return _known(values, read(values) if host is None else host, None)

    @property
    def host(self) -> Tensor | None:
        """Its numbers; None where it was written to."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._host if self._version == self._written else None

    @property
    def foreseen(self) -> bool:
        """Whether it is known what will be in its place."""
        return self._origin is not None and self.host is not None

    @property
    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor."""
        return self.as_subclass(Tensor)

    def ahead(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What will be in this one's place from its timestep on, and the same on the host; nothing where it was not
        made of one of several timesteps."""
        origin = self._origin
        if origin is None or (told := origin.timesteps.host) is None:
            return
        timesteps = origin.timesteps.plain
        for i in range(origin.index, len(told)):
            yield origin.made(timesteps[i], False), origin.made(told[i], True)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # by somebody else: our own models are given plain tensors
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _READ and len(args) == 1 and not kwargs and isinstance(args[0], cls) and args[0].host is not None:
            return getattr(args[0].host, name)()
        if name == "__getitem__" and not isinstance(args[0], cls) and isinstance(args[1], cls) and on_host(args[0]):
            # A scheduler looks up what it knows of a timestep.
            index = args[1].host
            return args[0][args[1].plain if index is None else index]
        if name in _BY_TYPE:
            return func(args[0].plain, *args[1:], **kwargs)
        if name == "unbind" and not any(args[1:]) and not kwargs and args[0].dim():  # a loop over it
            return tuple(args[0][i] for i in range(len(args[0])))
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
        if name == "__getitem__" and isinstance(args[0], cls) and _is_simple(args[1]):
            return _picked(made, args[0], args[1])
        if name in _FOLLOWED and type(made) is Tensor:
            return _followed(made, func, args, kwargs)
        return made


def _followed(made: Tensor, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What an op made, known to the host where all that it was made of is."""
    leaves, spec = pytree.tree_flatten((list(args), dict(kwargs)))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    hosts = [x.host if isinstance(x, HostKnown) else None for x in tensors]
    if any(host is None for host in hosts):
        return made
    moves = func.__name__ in _MOVES
    origins = [x._origin for x in tensors if isinstance(x, HostKnown)]

    def again(values: Iterator[Any], on_host: bool) -> Tensor:
        own, named = pytree.tree_unflatten([next(values) if isinstance(x, Tensor) else x for x in leaves], spec)
        result: Tensor = own[0].to(made.dtype) if moves and on_host else func(*own, **named)
        return result

    origin = None
    first = origins[0]
    if first is not None and all(
        o is not None and o.timesteps is first.timesteps and o.index == first.index for o in origins
    ):
        known: list[Made] = [o.made for o in origins if o is not None]
        origin = _Origin(first.timesteps, first.index, lambda x, on: again((m(x, on) for m in known), on))
    return _known(made, again(iter(hosts), True), origin)


def _picked(made: Tensor, values: HostKnown, index: Any) -> Tensor:
    """One of several timesteps, or a part of a value."""
    host = values.host
    if host is None:
        return made
    origin = values._origin
    if origin is not None:
        before = origin.made
        return _known(made, host[index], _Origin(origin.timesteps, origin.index, lambda x, on: before(x, on)[index]))
    if values.dim() == 1 and type(index) is int:
        return _known(made, host[index], _Origin(values, index % len(host), lambda x, _: x))
    return _known(made, host[index], None)


def _is_simple(index: Any) -> bool:
    """Whether an index is made of numbers and slices."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or type(part) in (int, slice) for part in parts)


def _known(values: Tensor, host: Tensor, origin: _Origin | None) -> Tensor:
    if values.is_inference() or values.shape != host.shape or values.dtype != host.dtype:
        return values
    with torch._C.DisableTorchFunctionSubclass():
        found = values.as_subclass(HostKnown)
        found._host, found._written, found._origin = host, found._version, origin
    return found


def read(values: Tensor) -> Tensor:
    """The same numbers on the host, for which it waits."""
    return values.cpu()


def has_accelerator() -> bool:
    """Whether there is a device to which tensors of the host may be moved."""
    return torch.accelerator.is_available()


def known_to_host(timesteps: Any) -> Any:
    """Timesteps as ``HostKnown``, where they lie on an accelerator (then the host waits for their numbers) or may be
    moved to one; others, and what is no plain tensor, as they are."""
    if not isinstance(timesteps, Tensor) or not is_plain(timesteps) or timesteps.is_meta:
        return timesteps
    return HostKnown.of(timesteps) if not on_host(timesteps) or has_accelerator() else timesteps


def plainly(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any], dict[int, Any]]:
    """A call's inputs as ordinary tensors, and those of them that the host knows, by ``id`` of the ordinary one. Where
    it is not known what will be in its place (each sample has a time of its own), it is as if the host knew nothing:
    what follows from such a time is asked for once, and compiled with the rest of the step that is least work."""
    made: dict[int, Tensor] = {}
    known: dict[int, Any] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, HostKnown):
            if id(value) not in made:
                made[id(value)] = value.plain
                if value.foreseen:
                    known[id(made[id(value)])] = value
            return made[id(value)]
        return value

    found = pytree.tree_map(plain, (tuple(args), dict(kwargs)))
    return (*found, known)
