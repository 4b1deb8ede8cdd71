"""Ranges: a model exported for every size of one dimension of its arguments, such as the batch.

``torch.export`` checks of the model that its Python takes the same way for every size. It is traced and laid out at the
least size, at the largest, and at one between; of the same steps and the same graphs only sizes may differ, and each
must be a multiple of the open size plus a number. These take the place of the numbers in the graphs.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from toca_compile.compiler.lay_out import Entry
from toca_compile.errors import ExportError
from toca_compile.exported.signature import leaves, mapped
from toca_compile.ir.graph import source_line
from toca_compile.ir.table import Kept, Open, OpenSizes, Size, Table, at

if TYPE_CHECKING:
    from toca_compile.exported.write import Traced

_Call = tuple[Sequence[Any], Mapping[str, Any]]
_SIZES = ("kinds", "buffers", "results")  # the fields of a table that hold some


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


class _Unlike(Exception):
    """What differs between sizes, and is no size."""


def fitted(several: Sequence["Traced"], of: Range) -> "Traced":
    """One for every size, of those at the range's points.

    Raises:
        ExportError: they differ in more than sizes; the message says in what.
    """
    last, fit = several[-1], _Fit(of.points, of.open)
    try:
        for told in ("returns", "given", "names"):
            fit.same([getattr(one.about, told) for one in several], f"the model's {told}")
        table = fit.table([one.table for one in several])
        fit.same([list(one.tensors) for one in several], "which tensors the model has")
        for name, value in last.tensors.items():
            if not all(torch.equal(one.tensors[name], value) for one in several):
                raise _Unlike(f"the tensor {name}")
        fit.same([list(one.laid.entries) for one in several], "which variants there are")
        entries = {name: fit.entry([one.laid.entries[name] for one in several]) for name in last.laid.entries}
    except _Unlike as error:
        raise ExportError(
            f"{last.about.model} cannot be exported for {of.open.name} from {of.open.least} to {of.open.most}: {error} "
            f"follows from it otherwise than as a size (compared at {', '.join(map(str, of.points))}). Export "
            "a file for each size, or for a smaller range"
        ) from None
    last.table, last.laid = table, replace(last.laid, table=table, entries=entries)
    return last


class _Fit:
    """What is the same at several sizes but for sizes."""

    def __init__(self, points: Sequence[int], what: Open) -> None:
        self.points, self.what = points, what

    def same(self, values: Sequence[Any], what: str) -> None:
        if any(value != values[0] for value in values):
            raise _Unlike(what)

    def sizes(self, values: Sequence[Sequence[int]], what: str) -> tuple[Size, ...]:
        """Shapes, or strides."""
        self.same([len(value) for value in values], what)
        return tuple(self.size(column, what) for column in zip(*values, strict=True))

    def size(self, values: Sequence[int], what: str) -> Size:
        if all(value == values[0] for value in values):
            return values[0]
        points = self.points
        slope, rest = divmod(values[-1] - values[0], points[-1] - points[0])
        found = slope, values[0] - slope * points[0]
        if rest or slope < 1 or any(at(found, p) != value for p, value in zip(points, values, strict=True)):
            raise _Unlike(what)
        return found

    def table(self, several: Sequence[Table]) -> Table:
        last = several[-1]
        for field in fields(Table):
            if field.name not in _SIZES:
                what = {"steps": "how many tokens a step computes"}.get(field.name, f"the plan's {field.name}")
                self.same([getattr(one, field.name) for one in several], what)
        self.same([list(one.kinds) for one in several], "what the model is given")
        kinds = {}
        for place, kind in last.kinds.items():
            own = [one.kinds[place] for one in several]
            what = f"the argument {last.inputs[place]}"
            self.same([(k["dtype"], k["device"]) for k in own], what)
            shape = self.sizes([k["shape"] for k in own], what)
            kinds[place] = {
                **kind,
                "shape": shape,
                "stride": self.sizes([k["stride"] for k in own], what),
            }
        self.same([[(b.dtype, b.device) for b in one.buffers] for one in several], "what is cached")
        buffers = tuple(
            Kept(self.sizes([k.shape for k in kept], "a cache's shape"), kept[-1].dtype, kept[-1].device)
            for kept in zip(*(one.buffers for one in several), strict=True)
        )
        results: list[tuple[int, tuple[Size, ...]] | None] = []
        for made in zip(*(one.results for one in several), strict=True):
            self.same([r if r is None else r[0] for r in made], "the model's results")
            laid = [r[1] for r in made if r is not None]
            fit = self.sizes(laid, "the model's results") if laid else ()
            results.append((made[-1][0], fit) if made[-1] is not None else None)
        return replace(last, kinds=kinds, buffers=buffers, results=tuple(results), open=self.what)

    def entry(self, several: Sequence[Entry]) -> Entry:
        last = several[-1]
        shapes: list[tuple[Size, ...]] = []
        strides: list[tuple[Size, ...]] = []
        for own in zip(*(one.examples for one in several), strict=True):
            if not all(isinstance(e, Tensor) for e in own):
                self.same([isinstance(e, Tensor) for e in own], "what a variant is given")
                own = ()
            shapes.append(self.sizes([e.shape for e in own], "a value's shape") if own else ())
            strides.append(self.sizes([e.stride() for e in own], "a value's stride") if own else ())
        found = [
            (size, i, dim)
            for i, shape in enumerate(shapes)
            for dim, size in enumerate(shape)
            if not isinstance(size, int)
        ]
        base, i, dim = min(found, default=((1, 0), -1, -1))

        def by_base(size: Size) -> Size:
            """A size by that of the one input that the code reads it from."""
            if isinstance(size, int):
                return size
            slope, rest = divmod(size[0], base[0])
            if rest:
                raise _Unlike("a value's shape")
            return slope, size[1] - slope * base[1]

        where = (i, dim, by_base) if found else None
        graph = self.graph([one.variant.module for one in several], where)
        variant = replace(last.variant, module=fx.GraphModule(last.variant.module, graph))
        if where is None:
            return replace(last, variant=variant)
        values = range(at(base, self.what.least), at(base, self.what.most) + 1, base[0])
        both = [tuple(tuple(map(by_base, own)) for own in sizes) for sizes in (shapes, strides)]
        return replace(last, variant=variant, sizes=OpenSizes(both[0], both[1], values, self.what.name))

    def graph(
        self, modules: Sequence[fx.GraphModule], where: tuple[int, int, Callable[[Size], Size]] | None
    ) -> fx.Graph:
        """The graph with sizes in the place of numbers. ``where``: from which input and dimension they follow, and
        how."""
        nodes = [list(module.graph.nodes) for module in modules]
        self.same([[(n.op, str(n.target)) for n in own if n.op != "placeholder"] for own in nodes], "a variant's graph")
        new, env = fx.Graph(), dict[fx.Node, fx.Node]()
        number = [{n: i for i, n in enumerate(own)} for own in nodes]
        made: dict[Size, fx.Node] = {}
        inputs = [n for n in nodes[-1] if n.op == "placeholder"]

        def sized(size: Size, node: fx.Node) -> Any:
            if isinstance(size, int):
                return size
            if where is None:
                raise _Unlike(f"a number at {source_line(node)} in a graph that is given nothing of this size")
            i, dim, by_base = where
            if size not in made:
                slope, offset = by_base(size)  # type: ignore[misc]
                told = new.call_function(torch.ops.aten.sym_size.int, (env[inputs[i]], dim))
                told = new.call_function(operator.mul, (told, slope)) if slope != 1 else told
                made[size] = new.call_function(operator.add, (told, offset)) if offset else told
            return made[size]

        def argument(values: Sequence[Any], node: fx.Node) -> Any:
            last = values[-1]
            what = f"an argument of {node.target} at {source_line(node)}"
            if any(type(value) is not type(last) for value in values):
                raise _Unlike(what)
            if isinstance(last, fx.Node):
                self.same([of[value] for of, value in zip(number, values, strict=True)], what)
                return env[last]
            if isinstance(last, list | tuple):
                self.same([len(value) for value in values], what)
                return type(last)(argument(column, node) for column in zip(*values, strict=True))
            if isinstance(last, Mapping):
                self.same([list(value) for value in values], what)
                return {k: argument([value[k] for value in values], node) for k in last}
            if isinstance(last, slice):
                return slice(*(argument([getattr(v, n) for v in values], node) for n in ("start", "stop", "step")))
            if type(last) is int:
                return sized(self.size(values, what), node)
            self.same(values, what)
            return last

        for several in zip(*nodes, strict=True):
            node = several[-1]
            if node.op == "placeholder":
                env[node] = new.node_copy(node)
                continue
            if node.op == "get_attr":
                own = [operator.attrgetter(n.target)(m) for m, n in zip(modules, several, strict=True)]
                if not all(torch.equal(value, own[-1]) for value in own):
                    raise _Unlike(f"the constant {node.target}")
                env[node] = new.node_copy(node)
                continue
            args = argument([n.args for n in several], node)
            kwargs = argument([n.kwargs for n in several], node)
            if node.op == "output":
                new.output(args[0])
                continue
            env[node] = new.create_node(node.op, node.target, args, kwargs, node.name)
            env[node].meta = dict(node.meta)
        return new
