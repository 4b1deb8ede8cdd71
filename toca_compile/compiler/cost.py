"""The cost model: FLOPs of a step as sympy expressions in batch B, tokens n, computed tokens K and width C.

Two counting rules of FLOPs:

* ``published``: as the ToCa authors count (a multiply-add is 2, softmax 5 an element, GELU 6, a norm 2, linears on the
  conditioning once per multiply-add), over the transformer blocks;
* ``torch``: what ``torch.utils.flop_counter`` counts, products only, over the whole graph; a run's also hold the
  products by which tokens are selected.

A third counts no FLOPs but bytes: ``sent``, what a process hands to the collectives of a model that several share.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from torch import fx

from toca_compile.errors import TocaError
from toca_compile.ir.actions import Action, Keep
from toca_compile.ir.graph import ancestors, group_of, operand_nodes, value_of
from toca_compile.ir.plan import Plan, StepPlan, scored_sites
from toca_compile.ir.program import Form, Program, Segment
from toca_compile.ir.types import FactorPos, Site
from toca_compile.passes.proof.follow import label_at
from toca_compile.passes.variants.narrow import Piece, by_linear, narrowed, pieces
from toca_compile.passes.variants.needed import needed_nodes
from toca_compile.rules.registry import RULES, Work

B, K, C = sympy.symbols("B K C", positive=True, integer=True)
Places = tuple[FactorPos, ...]


class CostModel:
    """FLOPs of the steps of one compiled graph."""

    def __init__(self, program: Program, counting: str = "published") -> None:
        if counting not in ("published", "torch", "sent"):
            raise TocaError(f"counting is 'published', 'torch' or 'sent', not {counting!r}")
        assert program.types is not None
        self.program, self.types, self.counting = program, program.types, counting
        self.axes = {s.axis.factors: sympy.Symbol(self._symbol(s), positive=True, integer=True) for s in program.sites}
        self.tokens = {f for factors in self.axes for f in factors}
        self.batch = {
            f for s in program.sites for f in s.batch
        } - self.tokens  # frames are samples of one axis, and another
        self.width = max((self._features(s) for s in program.sites), default=1)
        self._seen: dict[tuple[fx.Node, Places], sympy.Expr] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}

    @property
    def values(self) -> dict[sympy.Symbol, int]:
        """What the symbols stand for in this graph (K apart)."""
        numbers = {symbol: self.types.factors.size(factors) for factors, symbol in self.axes.items()}
        site = self.program.sites[0] if self.program.sites else None
        return {
            **numbers,
            B: self.types.factors.size(b for b in site.batch if b in self.batch) if site else 1,
            C: self.width,
        }

    def step(self, plan: StepPlan) -> int:
        """FLOPs of one step of a plan, without what is computed once a run. What follows from the time is counted as
        if each step came at a time of its own."""
        total = 0
        skipped = {i for i, action in enumerate(plan.sites) if action.by_blocks}
        inside = [i for i, s in enumerate(self.program.segments) if skipped & set(s.sites)]
        left_out = self.program.segments[inside[0] : inside[-1] + 1] if inside else ()
        unread = {n for s in left_out for n in s.nodes}
        for segment in self.program.segments:
            if not self._counted(segment, constant=False) or segment in left_out:
                continue
            if segment.timed and all(unread.issuperset(n.users) for n in segment.outputs):
                continue
            sites = [self.program.sites[i] for i in segment.sites]
            total += self._number(segment, sites, [plan.sites[i] for i in segment.sites])
        return total

    def run(self, plan: Plan) -> int:
        """FLOPs of all steps of a plan."""
        total = sum(self.step(step) for step in plan.steps) + int(self._constants().subs(self.values))
        if self.counting == "torch":
            measured = [self.program.sites[i] for step in scored_sites(plan, self.program.sites) for i in step]
            total += sum(plan.selector.products(site) for site in measured)
        return total

    def symbolic(self, actions: Sequence[Action]) -> sympy.Expr:
        """FLOPs of a step in which each site does what ``actions`` says, every partial one with K tokens. Where all
        compute it is a step of the uncached model, which has nothing from a step before."""
        uncached = all(a.dense for a in actions)
        total = self._constants() if uncached else sympy.Integer(0)
        for segment in self._segments(constant=False):
            sites = [self.program.sites[i] for i in segment.sites]
            parts = self._parts(segment, sites, [actions[i] for i in segment.sites])
            total += sum((expr for expr, _ in parts), sympy.Integer(0))
        return sympy.expand(total)

    def site(self, site: Site, action: Action) -> sympy.Expr:
        """FLOPs of one site's own branch."""
        if action.dense:
            return sympy.expand(sum(self._node(n) for n in site.region))
        proof = action.proof(site)
        whole = set(proof.dense_inputs) - set(action.from_cache(site)) if proof is not None else set()
        fresh = site.region & ancestors(whole, stop=[site.source]) if whole else ()
        return sympy.expand(self._rows(site, action) + sum(self._node(n) for n in fresh))

    def _rows(self, site: Site, action: Action) -> sympy.Expr:
        """What a step computes of a branch for selected tokens: of a linear layer, the features that it needs."""
        rows = action.rows(site)
        share = _shares(pieces(rows, self.types))
        return sum(
            (share.get(n, 1) * self._node(n, self._places(n, site, action)) for n in rows), sympy.Integer(0)
        )  # fmt: skip

    def _places(self, node: fx.Node, site: Site, action: Action) -> Places:
        """Where the tokens lie in the result of an op that is computed for some of them."""
        proof = action.proof(site)
        proofs = (proof, *proof.updates) if proof is not None else ()
        return next((p.tokens[node] for p in proofs if node in p.tokens), ())

    def _constants(self) -> sympy.Expr:
        """What is computed once a run."""
        nodes = [n for s in self._segments(constant=True) for n in s.nodes]
        return sympy.sympify(sum(self._node(n) for n in nodes))

    def _segments(self, *, constant: bool) -> list[Segment]:
        return [s for s in self.program.segments if self._counted(s, constant=constant)]

    def _counted(self, segment: Segment, *, constant: bool) -> bool:
        inside = bool(segment.sites) or segment.in_block or self.counting != "published"
        return inside and segment.constant == constant

    def _parts(
        self, segment: Segment, sites: Sequence[Site], actions: Sequence[Action]
    ) -> list[tuple[sympy.Expr, int | None]]:
        """Cost of a segment, apart for each site that computes rows (its position comes along): each has its own K."""
        forms = [Form(action, Keep()) for action in actions]
        needed = needed_nodes(segment, sites, forms)
        apart = {site.output for site, action in zip(sites, actions, strict=True) if not action.dense}
        # The published rules count all of a conditioning layer, of which a step may compute a part.
        published = self.counting == "published"
        share = {} if published else _shares(narrowed(segment, sites, forms, self.types, needed))
        whole = sum((share.get(n, 1) * self._node(n) for n in needed - apart), sympy.Integer(0))
        parts: list[tuple[sympy.Expr, int | None]] = [(whole, None)]
        for i, (site, action) in enumerate(zip(sites, actions, strict=True)):
            if action.rows(site):
                parts.append((self._rows(site, action), i))
        return parts

    def _number(self, segment: Segment, sites: Sequence[Site], actions: Sequence[Action]) -> int:
        # Segments of one template are one graph, so that long plans of deep models say few different things.
        computed = [action.computed(site) for site, action in zip(sites, actions, strict=True)]
        key = segment.template, segment.constant, *(a.form() for a in actions), *computed
        if key not in self._numbers:
            total = 0
            for expr, position in self._parts(segment, sites, actions):
                tokens = {K: computed[position]} if position is not None else {}
                total += int(sympy.sympify(expr).subs(self.values | tokens))
            self._numbers[key] = total
        return self._numbers[key]

    def _node(self, node: fx.Node, rows: Places = ()) -> sympy.Expr:
        """FLOPs of an op; ``rows``: where the tokens lie in its result, if it is computed for K of them."""
        if (node, rows) not in self._seen:
            self._seen[node, rows] = self._cost(node, rows)
        return self._seen[node, rows]

    def _cost(self, node: fx.Node, places: Places) -> sympy.Expr:
        rule = RULES.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
        spec = self.types.specs.get(node)
        sent = self.counting == "sent"
        if rule is None or spec is None or (group_of(node) is None if sent else rule.work is Work.NONE):
            return sympy.Integer(0)
        result = [label for dim in spec.results[0] for label in dim]
        restricted = [label_at(self.types, node, spec.results[0], place) for place in places]
        if sent:
            (given,) = operand_nodes(node)
            labels = [label for dim in spec.operands[0] for label in dim]
            return value_of(given).element_size() * self._size(node, labels, restricted)[0]
        if rule.work is Work.CONTRACT:
            if len(spec.operands) < 2:
                return sympy.Integer(0)
            bias_first = "add" in str(node.target)
            other = spec.operands[2 if bias_first else 1]
            labels = list(dict.fromkeys([*result, *(label for dim in other for label in dim)]))
            size, tokens = self._size(node, labels, restricted)
            conditioning = not tokens and self.counting == "published"
            return size * (1 if conditioning else 2)
        if rule.work is Work.ATTENTION:
            query, key, value = spec.operands[:3]
            rows = [label for dim in query[:-1] for label in dim]
            keys = [label for label in key[-2] if label not in rows]
            scores, _ = self._size(node, rows + keys, restricted)
            first, _ = self._size(node, rows + keys + list(query[-1]), restricted)
            second, _ = self._size(node, rows + keys + list(value[-1]), restricted)
            softmax = Work.SOFTMAX.value * scores if self.counting == "published" else 0
            return 2 * first + 2 * second + softmax
        if self.counting == "torch":
            return sympy.Integer(0)
        return rule.work.value * self._size(node, result, restricted)[0]

    def _size(
        self, node: fx.Node, labels: Sequence[str], restricted: Sequence[tuple[str, int] | None]
    ) -> tuple[sympy.Expr, bool]:
        """The product of the labels' sizes, and whether a token axis is among them; the factors ``restricted`` of them
        are K together."""
        given = {
            label: [f for i, f in enumerate(self.types.label(node, label)) if (label, i) not in restricted]
            for label in labels
        }
        some = any(len(given[label]) < len(self.types.label(node, label)) for label in labels)
        counted = Counter(f for label in labels for f in given[label])
        expr = K if some else sympy.Integer(1)
        tokens = some or any(self.tokens & self.types.factors.atoms((f,)) for f in counted)  # alone, or joined
        for factors, symbol in self.axes.items():
            times = min(counted[f] for f in factors)
            if times:
                expr *= symbol**times
                counted -= Counter({f: times for f in factors})
        rest, products = 1, 1
        left = Counter(counted)
        for label in labels:
            own = [f for f in given[label] if left[f] and f not in self.batch]
            left -= Counter(own)
            size = self.types.factors.size(own)
            if size % self.width == 0 and size:
                products *= size // self.width
                expr *= C
            else:
                rest *= size
        if rest % self.width == 0:
            rest, expr = rest // self.width, expr * C
        return expr * B ** (1 if any(f in self.batch for f in counted) else 0) * rest * products, tokens

    def _symbol(self, site: Site) -> str:
        names = list(dict.fromkeys(s.axis.name for s in self.program.sites))
        return "n" if len(names) == 1 else f"n_{site.axis.name}"

    def _features(self, site: Site) -> int:
        shape = [self.types.factors.size(d) for d in self.types.type_of(site.output)]
        total = 1
        for size in shape:
            total *= size
        return total // (site.axis.size * self.types.factors.size(site.batch))


def _shares(narrow: Mapping[fx.Node, Piece]) -> dict[fx.Node, sympy.Expr]:
    """How much of each linear layer is computed, of which only pieces are."""
    return {
        linear: sympy.Rational(sum(piece.size for piece in own.values()), value_of(linear).shape[-1])
        for linear, own in by_linear(narrow).items()
    }
