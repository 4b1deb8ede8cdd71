"""Ranges: a model exported for every size of one dimension of its arguments, such as the batch or the tokens.

``torch.export`` checks of the model that its Python takes the same way for every size. It is traced and laid out at the
least size, at the largest, and at one between; of the same steps and the same graphs only sizes may differ, and each
must be a multiple of the open size plus a number. These take the place of the numbers in the graphs (``fit.py``). How
many tokens a step computes is no such multiple: the policy is asked for it at every size (``plans.py``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from toca_compile.errors import ExportError
from toca_compile.exported.fit import Fit, Unlike
from toca_compile.exported.plans import Plans, numbers_of
from toca_compile.exported.signature import leaves, mapped
from toca_compile.ir.table import Open

if TYPE_CHECKING:
    from toca_compile.exported.write import Traced

_Call = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Range:
    """Which dimensions of a call's tensors are open. ``told``: what the user says of each argument; ``dims``:
    ``torch.export``'s dimensions, by the argument's path."""

    open: Open
    told: Mapping[str, Any]
    dims: dict[str, dict[int, Any]]

    @property
    def points(self) -> list[int]:
        """The sizes at which the model is traced."""
        least, most = self.open.least, self.open.most
        return sorted({least, (least + most) // 2, most})

    def call(self, parameters: Sequence[str], call: _Call, size: int) -> tuple[Any, Any]:
        """A call with such tensors: those of an example, repeated or cut off."""
        # Each an object of its own, so that one tensor that is two arguments is told apart.
        args, kwargs = (mapped(part, lambda v: v.clone() if isinstance(v, Tensor) else v) for part in call)
        paths = {id(value): path for path, value in leaves(parameters, args, kwargs).items()}

        def stretched(value: Any) -> Any:
            for dim, told in self.dims.get(paths.get(id(value), ""), {}).items():
                wanted = told.fn(size) if hasattr(told, "root") else size
                index = torch.arange(wanted, device=value.device) % value.shape[dim]
                value = value.index_select(dim, index)
            return value

        return mapped(args, stretched), mapped(kwargs, stretched)


def read(dynamic: Any, parameters: Sequence[str], call: _Call) -> Range:
    """The dimensions that are open, as ``torch.export`` is told them.

    Raises:
        ExportError: none is, several sizes are, one has no end, or what is told is no dimension of the call.
    """
    args, kwargs = call
    if isinstance(dynamic, Sequence) and not isinstance(dynamic, str):
        dynamic = {parameters[i]: told for i, told in enumerate(dynamic) if i < len(parameters)}
    if not isinstance(dynamic, Mapping):
        raise ExportError("dynamic must say which dimensions are open, as torch.export takes it")
    given = {parameters[i] if i < len(parameters) else str(i): value for i, value in enumerate(args)} | dict(kwargs)
    dims: dict[str, dict[int, Any]] = {}
    for name, told in dynamic.items():
        if name not in given:
            raise ExportError(f"dynamic names {name!r}, which is none of the arguments {', '.join(given)}")
        _visit(name, given[name], told, dims)
    roots = {root.__name__: root for own in dims.values() for d in own.values() for root in [getattr(d, "root", d)]}
    if len(roots) != 1:
        raise ExportError(f"one size can be open, and dynamic names {', '.join(roots) or 'none'}")
    ((name, root),) = roots.items()
    if not isinstance(root.max, int):
        raise ExportError(f"a file is checked up to a largest size: torch.export.Dim({name!r}, max=…)")
    if root.min == 1:
        raise ExportError(
            f"a range begins at 2, since torch gives what is of size 1 a form and code of its own: "
            f"torch.export.Dim({name!r}, min=2, max={root.max}), and a file of its own for 1"
        )
    least = max(root.min, 2)  # 0 where nothing is said
    if least >= root.max:
        raise ExportError(f"{name} is open from {least} to {root.max}, which is no range")
    return Range(Open(name, least, root.max), dynamic, dims)


def _visit(path: str, value: Any, told: Any, dims: dict[str, dict[int, Any]]) -> None:
    if told is None:
        return
    inner = dict(enumerate(told)) if isinstance(told, Sequence) and not isinstance(told, str) else told
    if not isinstance(inner, Mapping):
        raise ExportError(f"dynamic of {path} must be {{dimension: torch.export.Dim(…)}}, not {told!r}")
    if not isinstance(value, Tensor):
        parts = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        for key, one in inner.items():
            if not isinstance(parts, Mapping) or key not in parts:
                raise ExportError(f"dynamic names {path}.{key}, which is none of the arguments")
            _visit(f"{path}.{key}", parts[key], one, dims)
        return
    for dim, one in inner.items():
        if one is None:
            continue
        if not isinstance(one, Dim) or not isinstance(dim, int) or not 0 <= dim < value.dim():
            raise ExportError(f"dynamic of {path} must be {{dimension: torch.export.Dim(…)}}, not {told!r}")
        dims.setdefault(path, {})[dim] = one


def prove(model: nn.Module, call: _Call, parameters: Sequence[str], of: Range) -> None:
    """That the model's Python takes the same way for every size.

    Raises:
        ExportError: it does not, as far as ``torch.export`` can see.
    """
    args, kwargs = call
    given = dict(zip(parameters, args, strict=False)) | dict(kwargs)
    whole = {name: _whole(value, of.told.get(name)) for name, value in given.items()}
    try:
        with torch.no_grad():
            torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=whole, strict=False)
    except Exception as error:  # of many kinds: torch's own, and the model's
        told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"{type(model).__name__} cannot be exported for {of.open.name} from {of.open.least} to {of.open.most}; "
            f"torch.export says: {told.strip()}"
        ) from error


def _whole(value: Any, told: Any) -> Any:
    """What is told of an argument, in the argument's structure, as ``torch.export`` wants it."""
    if isinstance(value, Mapping):
        return {k: _whole(v, told.get(k) if isinstance(told, Mapping) else None) for k, v in value.items()}
    if isinstance(value, list | tuple):
        inner = told if isinstance(told, Mapping) else dict(enumerate(told or ()))
        return type(value)(_whole(v, inner.get(i)) for i, v in enumerate(value))
    return told


def fitted(several: Sequence["Traced"], of: Range) -> "Traced":
    """One for every size, of those at the range's points.

    Raises:
        ExportError: they differ in more than sizes; the message says in what.
    """
    last, fit = several[-1], Fit(of.points, of.open)
    try:
        for told in ("returns", "given", "names"):
            fit.same([getattr(one.about, told) for one in several], f"the model's {told}")
        plans = Plans(several, fit)
        table = fit.table([one.table for one in several])
        table = replace(table, steps=plans.steps, rows=plans.rows, sized=plans.sized)
        numbers = numbers_of(table)
        fit.same([list(one.tensors) for one in several], "which tensors the model has")
        for name, value in last.tensors.items():
            if not all(torch.equal(one.tensors[name], value) for one in several):
                raise Unlike(f"the tensor {name}")
        fit.same([list(one.laid.entries) for one in several], "which variants there are")
        entries = {
            name: fit.entry([one.laid.entries[name] for one in several], numbers.get(name, ((),)))
            for name in last.laid.entries
        }
    except Unlike as error:
        raise ExportError(
            f"{last.about.model} cannot be exported for {of.open.name} from {of.open.least} to {of.open.most}: {error} "
            f"follows from it otherwise than as a size (compared at {', '.join(map(str, of.points))}). Export "
            "a file for each size, or for a smaller range"
        ) from None
    last.table, last.laid = table, replace(last.laid, table=table, entries=entries)
    return last
