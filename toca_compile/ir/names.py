"""Names for factors, as they are printed: ``[b, (h w), c]`` in place of ``[(4,), (27, 28), (0,)]``."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import fx

from toca_compile.ir.factors import Factor, Product
from toca_compile.ir.program import Program
from toca_compile.ir.types import Attention, Site, TokenAxis, Type


class Names:
    """A name for every factor of a program, by what is known of it so far.

    ``b`` numbers samples; ``t``, ``h`` and ``w`` are frames, height and width of a token grid; ``n`` are tokens without
    one, ``m`` what only keys run over (text), ``heads`` the heads of an attention, ``c`` the width of a residual
    stream. All others are ``d`` and a number: their place in the graph, so that a factor that a later pass learns
    nothing of keeps its name. Several of one name are told apart by a number (``heads1``).
    """

    def __init__(self, program: Program) -> None:
        assert program.types is not None, "names are asked for before any type is known"
        self.types, self._factors = program.types, program.types.factors
        self.tokens: set[Factor] = set()
        self._names: dict[Factor, str] = {}
        self._taken: dict[str, int] = {}
        for site in program.sites:
            self._name_axis(site.axis)
        for attention in program.attentions:
            self._name_attention(attention)
        for site in program.sites:
            self._claim(site.batch, "b")
        self._claim(_samples(program), "b")
        for attention in program.attentions:
            self._claim(attention.lead, "heads")
        for site in program.sites:
            for dim in self.types.type_of(site.source):
                self._claim(dim, "c")
        calls = [n for n in program.module.graph.nodes if n.op == "call_function"]
        places: dict[Factor, None] = {}
        for node in (*calls, *program.placeholders):
            for result in range(len(self.types.results.get(node, ()))):
                for dim in self.types.type_of(node, result):
                    places.update(dict.fromkeys(f for part in (dim, *self._parts(dim)) for f in part))
        for place, factor in enumerate(places):
            self._names.setdefault(factor, f"d{place}")
        self._order = list(places)

    def dim(self, product: Product) -> str:
        """One dimension: ``1``, ``c`` or ``(h w)``."""
        names = [self._names.get(f, "?") for f in self._factors.resolve(product)]
        return f"({' '.join(names)})" if len(names) > 1 else "".join(names) or "1"

    def type(self, dims: Type) -> str:
        """All dimensions of a value: ``[b, (h w), c]``."""
        return f"[{', '.join(self.dim(d) for d in dims)}]"

    def fitted(self, dims: Type, shape: Sequence[int], *, some: bool = False) -> str | None:
        """The type of a value of a rewritten graph that stands for one of type ``dims``: the same, or with ``K`` in the
        place of the tokens that are selected from. None where the shape is neither; with ``some`` a dimension of which
        the value has a part is ``…``."""
        if len(dims) != len(shape):
            return None
        told = []
        for dim, size in zip(map(self._factors.resolve, dims), shape, strict=True):
            rest = tuple(f for f in dim if f not in self.tokens)
            if self._factors.size(dim) == size:
                told.append(self.dim(dim))
            elif len(rest) < len(dim) and size % self._factors.size(rest) == 0 and size < self._factors.size(dim):
                inner = " ".join(self._names.get(f, "?") for f in rest)
                told.append(f"({inner} K)" if rest else "K")
            elif some and size < self._factors.size(dim):
                told.append("…")
            else:
                return None
        return f"[{', '.join(told)}]"

    def spread(self, dims: Type, shape: Sequence[int]) -> str | None:
        """The type of rows of tokens that lie in several dimensions: ``K`` in one of them, the others whole, gone or of
        size 1; None where the shape is none of such rows."""
        dims = tuple(map(self._factors.resolve, dims))
        held = [d for d, dim in enumerate(dims) if set(dim) & set(self.tokens)]
        for at in held:
            rest = tuple(f for f in dims[at] if f not in self.tokens)
            inner = " ".join(self._names.get(f, "?") for f in rest)
            gone = {d for d in held if d != at and set(dims[d]) <= set(self.tokens)}
            for without in (gone, set[int]()):
                left = [
                    d for d in range(len(dims)) if d not in without and (d == at or self._factors.size(dims[d]) > 1)
                ]
                told = []
                for size in shape:
                    if size == 1:
                        told.append("1")
                    elif left and left[0] == at and size % self._factors.size(rest) == 0:
                        told.append(f"({inner} K)" if rest else "K")
                        left.pop(0)
                    elif left and left[0] != at and self._factors.size(dims[left[0]]) == size:
                        told.append(self.dim(dims[left.pop(0)]))
                    else:
                        break
                if not left and len(told) == len(shape):
                    return f"[{', '.join(told)}]"
        return None

    def legend(self, among: Callable[[str], bool] = lambda name: True) -> list[str]:
        """The sizes, ``h w = 4``, ``n = m + (h w) = 21``, …, of all names that ``among`` picks: those of one kind and
        size together, what is known first, in the order of the graph."""
        alike: dict[tuple[bool, str], list[str]] = {}
        for factor, name in ((f, self._names[f]) for f in self._order if among(self._names[f])):
            parts = self._parts((factor,))
            sums = " + ".join(self.dim(p) for p in parts) + " = " if len(parts) > 1 else ""
            alike.setdefault((name[0] == "d", f"{sums}{self._factors.size((factor,))}"), []).append(name)
        groups = sorted(alike.items(), key=lambda group: group[0][0])
        return [f"{' '.join(names)} = {size}" for (_, size), names in groups]

    @property
    def count(self) -> int:
        """How many index spaces there are."""
        return len(self._order)

    def _parts(self, product: Product) -> tuple[Product, ...]:
        return self._factors.segments(product)

    def _name_axis(self, axis: TokenAxis) -> None:
        for part in self._parts(axis.factors):
            groups = self._grid(part, axis)
            for group, base in zip(groups, "thw", strict=False):
                self._claim(group, base)
            # Of an axis with a grid, what is no picture are registers or text before it.
            self._claim(part, "m" if axis.grid is not None and not groups else "n")
        self._claim(axis.factors, "n")
        self.tokens |= self._factors.atoms(axis.factors)

    def _grid(self, part: Product, axis: TokenAxis) -> list[Product]:
        """Frames, height and width, where they are factors of their own."""
        sizes = [axis.frames, *axis.grid] if axis.grid is not None else []
        groups: list[Product] = []
        rest = list(part)
        for size in reversed(sizes):
            group: list[Factor] = []
            while rest and self._factors.size(group) < size:
                group.insert(0, rest.pop())
            if self._factors.size(group) != size:
                return []
            groups.insert(0, tuple(group))
        return groups if not rest else []

    def _name_attention(self, attention: Attention) -> None:
        for product, base in ((attention.axis, "n"), (attention.key_axis, "m")):
            for part in (*self._parts(product), product):
                self._claim(part, base)
        self.tokens |= self._factors.atoms(attention.axis)

    def _claim(self, product: Iterable[Factor], base: str) -> None:
        for factor in self._factors.resolve(product):
            if factor not in self._names:
                count = self._taken[base] = self._taken.get(base, -1) + 1
                self._names[factor] = f"{base}{count}" if count else base


def _samples(program: Program) -> Product:
    """The dimension that the model's result and an input of it both begin with."""
    assert program.types is not None
    types = program.types

    def first(nodes: Iterable[fx.Node]) -> list[Product]:
        values = [types.type_of(n) for n in nodes if types.results.get(n)]
        return [dims[0] for dims in values if dims]

    ends = first(program.module.graph.output_node().all_input_nodes)
    return next((dim for dim in first(program.varying) if dim and dim in ends), ())


_SHORT = {"self_attention": "attn", "cross_attention": "cross_attn", "joint_attention": "joint_attn"}


def distinct_names(sites: Sequence[Site]) -> list[str]:
    """The sites' names, each of one site alone. Where branches come from one module they are told apart by the axis of
    their tokens, else by what they are (``blocks.0.attn``, ``blocks.0.mlp``), else by both, else by number."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.name, []).append(site)
    ways: tuple[Callable[[Site], str], ...] = (
        lambda s: s.name,
        lambda s: f"{s.name}[{s.axis.name}]",
        lambda s: f"{s.name}.{_SHORT.get(s.kind, s.kind)}",
        lambda s: f"{s.name}.{_SHORT.get(s.kind, s.kind)}[{s.axis.name}]",
    )
    named: dict[int, str] = {}
    for group in groups.values():
        others = groups.keys() - {group[0].name}
        told = next((t for t in ([w(s) for s in group] for w in ways) if len({*t} - others) == len(t)), None)
        if told is None:
            told, seen = [], Counter[str]()
            for name in map(ways[2], group):
                seen[name] += 1
                told.append(f"{name}.{seen[name]}")
        named.update((s.index, name) for s, name in zip(group, told, strict=True))
    return [named[s.index] for s in sites]
