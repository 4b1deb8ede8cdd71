"""Axis specs: what one op does to the dimensions of its operands, as an einsum with marks.

A spec names the dimensions of each operand and result with labels. A label that an operand and the result share is
*carried*: restricting the result to some of its indices needs the operand at the same indices only. A label missing
from the result is contracted; a label marked ``!`` is in the result but each element reads all of it (softmax, norms).
A dimension may be a product of labels, written ``(b t)`` and held as the tuple ``("b", "t")``; ``()`` is a dimension
of size 1. In one value a label stands once: a subset is taken in one place. Concatenation and windows (slices) are
stated apart, since the result's label is a sum or a part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

from toca_compile.errors import RuleError

Dim = tuple[str, ...]
Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Window:
    """A label that is ``size`` elements of another, from ``start`` on, every ``step``-th."""

    source: str
    start: int
    step: int = 1


@dataclass(frozen=True)
class AxisSpec:
    """Dimensions of every tensor operand (in the order of the call) and of every tensor result of one op call."""

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, int]
    mixed: frozenset[str] = frozenset()
    placed: frozenset[str] = frozenset()  # mixed only in that the op counts: told which they are, a subset will do
    concat: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    processes: frozenset[str] = frozenset()  # number those that share a model's work
    because: Mapping[str, str] = field(default_factory=dict)  # of a mixed label: what the op does, if that can be said

    def __post_init__(self) -> None:
        for dims in (*self.operands, *self.results):
            named = [label for dim in dims for label in dim]
            if len(named) != len(set(named)):
                raise RuleError(f"a label stands twice in one value: {' '.join(named)}")

    @property
    def carried(self) -> frozenset[str]:
        """Labels along which a subset of the result needs only that subset of the operands."""
        operand_labels = {label for dims in self.operands for dim in dims for label in dim}
        result_labels = {label for dims in self.results for dim in dims for label in dim}
        return frozenset((operand_labels & result_labels) - self.mixed)


def einsum(pattern: str, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]) -> AxisSpec:
    """Spec from a pattern such as ``"... i, o i, o -> ... o"``.

    ``...`` stands for any leading dimensions, which broadcast against each other from the right. A letter with ``!`` is
    mixed. A dimension of size 1 where another operand has more is a broadcast and carries nothing. Operands that a call
    leaves out are the last ones of the pattern.

    Raises:
        RuleError: the pattern does not fit the shapes, or names two dimensions of one value alike.
    """
    left, right = pattern.split("->")
    sizes: dict[str, int] = {}
    mixed: set[str] = set()
    terms = [t.split() for t in left.split(",")], [t.split() for t in right.split(",")]
    if len(operands) > len(terms[0]):
        raise RuleError(f"pattern {pattern!r} has fewer operands than the call")

    def bind(term: list[str], shape: Sequence[int]) -> Dims:
        names = list(term)
        if "..." in names:
            at = names.index("...")
            extra = len(shape) - len(names) + 1
            names[at : at + 1] = [f"_{extra - i}" for i in range(extra)]
        if len(names) != len(shape):
            raise RuleError(f"pattern {pattern!r}: {' '.join(term)!r} does not fit the shape {tuple(shape)}")
        dims: list[Dim] = []
        for name, size in zip(names, shape, strict=True):
            label = name.rstrip("!")
            if name.endswith("!"):
                mixed.add(label)
            if size == 1:
                dims.append(())
                continue
            if sizes.setdefault(label, size) != size:
                raise RuleError(f"pattern {pattern!r}: {label!r} is both {sizes[label]} and {size}")
            dims.append((label,))
        return tuple(dims)

    ins = tuple(bind(t, s) for t, s in zip(terms[0], operands, strict=False))
    outs = tuple(bind(t, s) for t, s in zip(terms[1], results, strict=True))
    return AxisSpec(ins, outs, sizes, frozenset(mixed))


def elementwise(operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]) -> AxisSpec:
    """Spec of a pointwise op: everything broadcasts, everything is carried."""
    return einsum(",".join("..." for _ in operands) + "->" + ",".join("..." for _ in results), operands, results)


def over_dims(operand: Sequence[int], dims: Sequence[int], results: Sequence[Sequence[int]], keep: bool) -> AxisSpec:
    """Spec of an op that reads ``dims`` whole: mixed where they stay in the result (softmax), contracted otherwise.

    ``keep``: the result still has a dimension there, of size 1 or of the full size.
    """
    rank = len(operand)
    over = {d % rank for d in dims} if rank else set()
    names = [f"d{i}" for i in range(rank)]
    out = [f"{n}!" if i in over else n for i, n in enumerate(names) if keep or i not in over]
    right = ",".join(" ".join(out) for _ in results)
    return einsum(" ".join(names) + "->" + right, [operand], results)


def regroup(operand: Sequence[int], result: Sequence[int]) -> AxisSpec:
    """Spec of a view: the finest factors that both shapes are products of. Where a boundary of one shape falls inside
    a factor of the other without dividing it (4×3 seen as 6×2), that stretch is one opaque mix."""
    sizes: dict[str, int] = {}
    ins: list[list[str]] = [[] for _ in operand]
    outs: list[list[str]] = [[] for _ in result]
    mixed: set[str] = set()
    if 0 in operand:
        raise RuleError("an empty value has no order of elements")
    i = j = 0
    rest_in, rest_out = list(operand), list(result)
    while True:
        while i < len(rest_in) and rest_in[i] == 1:
            i += 1
        while j < len(rest_out) and rest_out[j] == 1:
            j += 1
        if i == len(rest_in) or j == len(rest_out):
            break
        common = gcd(rest_in[i], rest_out[j])
        if common > 1 and (rest_in[i] == common or rest_out[j] == common):
            label = f"f{len(sizes)}"
            sizes[label] = common
            ins[i].append(label)
            outs[j].append(label)
            rest_in[i] //= common
            rest_out[j] //= common
            continue
        # No common boundary here: take whole dimensions until the products meet, and call the stretch mixed.
        a, b = [i], [j]
        while (x := prod(rest_in[k] for k in a)) != (y := prod(rest_out[k] for k in b)):
            if x < y:
                a.append(a[-1] + 1)
            else:
                b.append(b[-1] + 1)
        for dims, rest, group in ((ins, rest_in, a), (outs, rest_out, b)):
            for k in group:
                if rest[k] > 1:
                    label = f"f{len(sizes)}"
                    sizes[label] = rest[k]
                    mixed.add(label)
                    dims[k].append(label)
                    rest[k] = 1
    return AxisSpec((tuple(tuple(d) for d in ins),), (tuple(tuple(d) for d in outs),), sizes, frozenset(mixed))
