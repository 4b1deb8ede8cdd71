"""Fit: tables and graphs of a model at several sizes, as one in which sizes follow from the open one."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from toca_compile.compiler.lay_out import Entry
from toca_compile.ir.graph import source_line
from toca_compile.ir.table import Kept, Open, OpenSizes, Size, Table, Told, at

_FITTED = ("kinds", "buffers", "results")  # the fields of a table that hold sizes
_PLANNED = ("steps", "rows", "sized")  # and those that are put together of the plans (plans.py)


class Unlike(Exception):
    """What differs between sizes, and is no size."""


class Fit:
    """What is the same at several sizes but for sizes."""

    def __init__(self, points: Sequence[int], what: Open) -> None:
        self.points, self.what = points, what

    def same(self, values: Sequence[Any], what: str) -> None:
        if any(value != values[0] for value in values):
            raise Unlike(what)

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
            raise Unlike(what)
        return found

    def table(self, several: Sequence[Table]) -> Table:
        """The table, but for what follows from the plan."""
        last = several[-1]
        for field in fields(Table):
            if field.name not in _FITTED + _PLANNED:
                self.same([getattr(one, field.name) for one in several], f"the plan's {field.name}")
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

    def entry(self, several: Sequence[Entry], numbers: Sequence[Told]) -> Entry:
        """A variant. ``numbers``: as of ``OpenSizes``."""
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
                raise Unlike("a value's shape")
            return slope, size[1] - slope * base[1]

        where = (i, dim, by_base) if found else None
        graph = self.graph([one.variant.module for one in several], where)
        variant = replace(last.variant, module=fx.GraphModule(last.variant.module, graph))
        if where is None:
            return replace(last, variant=variant)
        values = range(at(base, self.what.least), at(base, self.what.most) + 1, base[0])
        both = [tuple(tuple(map(by_base, own)) for own in sizes) for sizes in (shapes, strides)]
        return replace(last, variant=variant, sizes=OpenSizes(both[0], both[1], values, self.what.name, tuple(numbers)))

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
                raise Unlike(f"a number at {source_line(node)} in a graph that is given nothing of this size")
            i, dim, by_base = where
            if size not in made:
                try:
                    slope, offset = by_base(size)  # type: ignore[misc]
                except Unlike:
                    what = f"an argument of {node.target} at {source_line(node)}"
                    raise Unlike(f"{what}, a fraction of the sizes that its graph is given,") from None
                told = new.call_function(torch.ops.aten.sym_size.int, (env[inputs[i]], dim))
                told = new.call_function(operator.mul, (told, slope)) if slope != 1 else told
                made[size] = new.call_function(operator.add, (told, offset)) if offset else told
            return made[size]

        def argument(values: Sequence[Any], node: fx.Node) -> Any:
            last = values[-1]
            what = f"an argument of {node.target} at {source_line(node)}"
            if any(type(value) is not type(last) for value in values):
                raise Unlike(what)
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
                    raise Unlike(f"the constant {node.target}")
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
