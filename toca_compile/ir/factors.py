"""Factors: the atoms from which every dimension of every value is made.

A dimension is a product of factors, major first: ``(b t) s c`` has the dimensions ``(b, t)``, ``(s,)`` and ``(c,)``; a
dimension of size 1 is the empty product. Ops equate factors (an addition says that two dimensions are the same index
space) and views take them apart (a reshape of 64 to 8×8 refines one factor into two). Both facts hold everywhere the
factor occurs, so they live in one union-find table.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod

Factor = int
Product = tuple[Factor, ...]


class Factors:
    """Union-find over factors, with refinement (a factor is a product of others) and sums (a concatenation)."""

    def __init__(self) -> None:
        self._parent: list[Factor] = []
        self._size: list[int] = []
        self._parts: dict[Factor, Product] = {}
        self._segments: dict[Factor, tuple[Product, ...]] = {}
        self._concatenations: dict[tuple[Product, ...], Factor] = {}
        self._windows: dict[tuple[Product, int, int, int], Product] = {}

    def new(self, size: int) -> Product:
        """A fresh index space of ``size`` elements; the empty product for size 1."""
        if size == 1:
            return ()
        self._parent.append(len(self._parent))
        self._size.append(size)
        return (len(self._parent) - 1,)

    def size(self, product: Iterable[Factor]) -> int:
        """Number of elements of a product of factors."""
        return prod(self._size[self._root(f)] for f in product)

    def resolve(self, product: Iterable[Factor]) -> Product:
        """The same product in its current finest form: roots only, none of them refined."""
        out: list[Factor] = []
        for factor in product:
            root = self._root(factor)
            out.extend(self.resolve(self._parts[root]) if root in self._parts else (root,))
        return tuple(out)

    def unify(self, a: Product, b: Product) -> bool:
        """State that two products index the same space. False where their sizes have no common refinement."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x == y:
                continue
            if self._size[x] == self._size[y]:
                self._union(x, y)
            elif self._size[x] > self._size[y]:
                if not self._refine(x, self._size[y]):
                    return False
                left[:0] = self.resolve((x,))
                right.insert(0, y)
            else:
                if not self._refine(y, self._size[x]):
                    return False
                right[:0] = self.resolve((y,))
                left.insert(0, x)
            left, right = list(self.resolve(left)), list(self.resolve(right))
        return not left and not right

    def split(self, product: Product, sizes: Sequence[int]) -> tuple[Product, ...] | None:
        """Regroup a product into consecutive products of the given sizes, refining where a boundary falls inside a
        factor. None where that cannot be: 6×4 has no 8×3. An empty index space is that of one group alone."""
        rest, groups = list(self.resolve(product)), []
        if 0 in sizes:
            return (tuple(rest),) if len(sizes) == 1 and self.size(rest) == 0 else None
        for size in sizes:
            group: list[Factor] = []
            while size > 1:
                if not rest or not self._size[rest[0]]:
                    return None
                head = rest.pop(0)
                if size % self._size[head] == 0:
                    group.append(head)
                    size //= self._size[head]
                elif self._size[head] % size == 0 and self._refine(head, size):
                    rest[:0] = self.resolve((head,))
                else:
                    return None
            groups.append(tuple(group))
        return tuple(groups) if not rest else None

    def concatenate(self, segments: Sequence[Product]) -> Product:
        """The index space of ``segments`` laid end to end. The same ones laid end to end twice are the same."""
        if len(segments) == 1:
            return segments[0]
        parts = tuple(part for s in segments for part in self.segments(s))
        if parts in self._concatenations:
            return (self._concatenations[parts],)
        whole = self.new(sum(self.size(s) for s in segments))
        if whole:
            self._concatenations[parts] = whole[0]
        if whole:
            self._segments[whole[0]] = tuple(segments)
        return whole

    def segments(self, product: Product) -> tuple[Product, ...]:
        """The parts of a concatenated dimension, finest form; the dimension itself if it is no concatenation."""
        product = self.resolve(product)
        if len(product) == 1 and product[0] in self._segments:
            return tuple(part for s in self._segments[product[0]] for part in self.segments(s))
        return (product,)

    def atoms(self, product: Product) -> set[Factor]:
        """The factors of a dimension, and those of the parts, and of theirs, of each that is a concatenation."""
        product = self.resolve(product)
        parts = [part for factor in product for part in self._segments.get(factor, ())]
        return set(product).union(*(self.atoms(part) for part in parts))

    def window(self, product: Product, start: int, size: int, step: int) -> Product:
        """The index space of ``size`` elements from ``start`` on, every ``step``-th. A window that is the whole, or a
        run of whole segments of a concatenation, is that space itself; the same window asked for twice is the same."""
        product = self.resolve(product)
        if size == self.size(product):
            return product
        if step == 1:
            ends = list(accumulate(map(self.size, self.segments(product)), initial=0))
            if size and start in ends and start + size in ends:
                return self.concatenate(self.segments(product)[ends.index(start) : ends.index(start + size)])
        key = (product, start, size, step)
        if key not in self._windows:
            self._windows[key] = self.new(size)
        return self._windows[key]

    def _root(self, factor: Factor) -> Factor:
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def _union(self, a: Factor, b: Factor) -> None:
        keep, drop = min(a, b), max(a, b)
        self._parent[drop] = keep
        if drop in self._segments:
            moved = self._segments.pop(drop)
            kept = self._segments.setdefault(keep, moved)
            if kept is not moved and [self.size(s) for s in kept] == [self.size(s) for s in moved]:
                for x, y in zip(kept, moved, strict=True):
                    self.unify(x, y)

    def _refine(self, factor: Factor, major: int) -> bool:
        """Take ``factor`` apart into ``major`` × the rest."""
        size = self._size[factor]
        if not major or size % major:
            return False
        self._segments.pop(factor, None)
        self._parts[factor] = self.new(major) + self.new(size // major)
        return True
