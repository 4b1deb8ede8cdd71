"""Variants: a segment and what its sites do, to a callable: built, verified and lowered."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import fx

from toca_compile.compiler import numeric_check
from toca_compile.compiler.trace import show
from toca_compile.ir.actions import Keep
from toca_compile.ir.calls import tensors
from toca_compile.ir.graph import CAPTURED_AS, value_of
from toca_compile.ir.plan import Plan
from toca_compile.ir.printer import print_variant, variant_name
from toca_compile.ir.program import Chain, Form, Kind, Program, Segment, StandIn, Stream, Use, Variant, uses_of
from toca_compile.ir.selectors import TokenSelector
from toca_compile.ir.state import Number, Slot, State
from toca_compile.ir.storage import Storage
from toca_compile.ir.types import Site
from toca_compile.ir.verify import verify_variant
from toca_compile.lowerings import Lowering, of_rare_calls
from toca_compile.passes.variants.chain import chained
from toca_compile.passes.variants.in_memory import in_memory
from toca_compile.passes.variants.rewrite import rewrite
from toca_compile.passes.variants.skip_range import stand_in
from toca_compile.passes.variants.store import store
from toca_compile.runtime.cache_state import seen_buffer, storage_of
from toca_compile.runtime.executor import Graph

# What tells a variant: segment, what its sites do, whether rows are computed for all tokens, and how they are ranked.
Key = tuple[Kind, tuple[Form, ...], bool, TokenSelector | None]


class ProgramVariants:
    """The graphs of one program.

    Args:
        lower: makes a callable of a variant.
        dense: build every variant in its plain meaning: rows computed for all tokens and blended by mask.
        numbers: the device on which host numbers lie for the variants, all but K; None: on the host.

    Attributes:
        by_sample: of what leaves skipped blocks, the shape of a number for each sample, if samples lie in it: numbers
            that multiply it are tensors of that. None: they are host numbers.
        checked: which variants were held against their plain meaning, by ``Key``, and the seconds.
        uses: what those that are compiled do with their buffers.
    """

    def __init__(self, program: Program, lower: Lowering, *, dense: bool, numbers: torch.device | None = None) -> None:
        self.program, self.lower, self.dense, self.numbers = program, lower, dense, numbers
        self.by_sample: Callable[[Stream], tuple[int, ...] | None] | None = None
        self.checked: dict[Any, float] = {}
        self._built: dict[Key, Variant] = {}
        self.uses: dict[tuple[Kind, tuple[Form, ...]], dict[Slot, Use]] = {}
        self._unranked: dict[tuple[Kind, tuple[Form, ...]], Graph] = {}  # those that no selector has a part in
        self._values: dict[Any, Any] = {}  # of calls, by op and types of operands: variants differ in a few

    def lowered(self, lower: Lowering, *, dense: bool, numbers: torch.device | None) -> "ProgramVariants":
        """The same, lowered another way: what is built for one way is built for all."""
        other = copy(self)
        other.lower, other.dense, other.numbers, other._unranked = lower, dense, numbers, {}
        return other

    def compiled(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Graph:
        """A segment's variant as a callable, which of the segment's inputs it takes, and its slots.

        Raises:
            PassError: it cannot be built.
            VerifyError: it is not what it stands for.
            LoweringError: the machine cannot compile.
        """
        if (segment.kind, forms) in self._unranked:
            return self._unranked[segment.kind, forms]
        variant = self.build(segment, forms, plan)
        known = self.uses.setdefault((segment.kind, forms), {})
        for slot, use in uses_of(variant).items():  # however tokens are selected
            known[slot] = use | known.get(slot, use)
        name = variant_name(segment, forms)
        show(name, lambda: "built", lambda: print_variant(variant, self.program, segment, forms))
        examples = [_example(segment.inputs[i]) for i in variant.values]
        inputs = variant.module.graph.find_nodes(op="placeholder")
        examples += map(value_of, inputs[len(variant.values) :])
        held = self._held(variant, segment, forms)
        if held:
            like = tensors(examples)[0]
            device = self.numbers or like.device
            variant = in_memory(variant, device, held)
            for place, slot in enumerate(variant.slots, len(variant.values)):
                if slot in held:
                    examples[place] = like.new_empty(held[slot], dtype=torch.int64, device=device)
        lower = of_rare_calls(self.lower) if segment.timed else self.lower
        graph = lower(variant, examples), variant.values, variant.slots
        if not variant.ranks:
            self._unranked[segment.kind, forms] = graph
        return graph

    def told_apart(self, slot: Slot, of: Site | Stream, keep: Keep) -> tuple[int, ...] | None:
        """The shape of a number that each sample has its own of; None where it is none."""
        if self.by_sample is None or keep.history is None or not isinstance(of, Stream):
            return None
        return self.by_sample(of) if slot.kind in keep.history.by_value else None

    def _held(self, variant: Variant, segment: Segment, forms: tuple[Form, ...]) -> dict[Slot, tuple[int, ...]]:
        """Those of a variant's numbers that are tensors, and their shapes."""
        if self.numbers is not None:
            return {slot: () for slot in variant.slots if slot.is_held}
        owners = self._owners(segment)
        shapes = {s: self.told_apart(s, owners[s.position], forms[s.position].keep) for s in variant.slots}
        return {slot: shape for slot, shape in shapes.items() if shape is not None}

    def build(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Variant:
        """The rewritten graph of a segment, checked against what it stands for; built once."""
        dense = self.dense and not all(form.action.dense for form in forms)  # else both meanings are one
        for selector in (None, plan.selector):
            if (segment.kind, forms, dense, selector) in self._built:
                return self._built[segment.kind, forms, dense, selector]
        # Values are fake tensors: in inference mode torch loses what they are on the way through a vmap.
        with torch.inference_mode(False), torch.no_grad():
            variant = self._made(segment, forms, plan)
        self._built[segment.kind, forms, dense, plan.selector if variant.ranks else None] = variant
        return variant

    def _made(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Variant:
        """The same, anew."""
        if isinstance(segment, Chain):
            return self._chain(segment, forms, plan)
        if isinstance(segment, StandIn):
            variant = stand_in(segment, forms)
            self._propagate(variant, segment, forms, plan.selector)
            if segment.outputs:  # what a probe tells is no value of the graph
                verify_variant(variant, segment)
        else:
            variant = self._rewritten(segment, forms, plan)
        store(variant, {slot: storage for slot in variant.slots if (storage := _storage(slot, forms)) is not None})
        return variant

    def _rewritten(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Variant:
        """The graph of a segment of the program."""
        program, selector = self.program, plan.selector
        assert program.types is not None
        # The first segment of the template stands for all: inputs, outputs and sites correspond by position.
        exemplar = next(s for s in program.segments if s.template == segment.template)
        sites = [program.sites[i] for i in exemplar.sites]
        variant = rewrite(exemplar, sites, forms, program.types, selector, dense=self.dense)
        self._propagate(variant, exemplar, forms, selector)
        verify_variant(variant, exemplar)
        if not self.dense and self._is_due(exemplar, sites, forms):
            began = time.perf_counter()
            meaning = rewrite(exemplar, sites, forms, program.types, selector, dense=True)
            examples: dict[Any, Any] = {i: _example(n) for i, n in enumerate(exemplar.inputs)}
            for slot in (*variant.slots, *meaning.slots):
                examples[slot] = self._slot(slot, sites, forms, selector)
            names, shared = [s.name for s in sites], selector.paired
            numeric_check.check_partial(variant, meaning, examples, names, shared_pair=shared)
            key = exemplar.kind, forms, False, selector if variant.ranks else None
            self.checked[key] = time.perf_counter() - began
        return variant

    def _chain(self, chain: Chain, forms: tuple[Form, ...], plan: Plan) -> Variant:
        """The graph of several segments, of those of their own."""
        variant = chained(chain, [self.build(part, own, plan) for part, own in chain.apart(forms)])
        verify_variant(variant, chain)
        return variant

    def _is_due(self, segment: Segment, sites: list[Site], forms: tuple[Form, ...]) -> bool:
        """Whether a variant that computes rows is checked: the first of its template, or each (``TOCA_VERIFY=all``)."""
        asked = numeric_check.wanted()
        by_rows = any(form.action.proof(site) is not None for site, form in zip(sites, forms, strict=True))
        if not by_rows or asked is numeric_check.Checks.NONE:
            return False
        first = not any(kind == segment.kind for kind, *_ in self.checked)
        return first or asked is numeric_check.Checks.ALL

    def _owners(self, segment: Segment) -> Sequence[Site | Stream]:
        """Whose slots its variants have, by position."""
        if isinstance(segment, StandIn):
            return segment.owners
        if isinstance(segment, Chain):
            return [owner for part in segment.parts for owner in self._owners(part)]
        return [self.program.sites[i] for i in segment.sites]

    def _slot(self, slot: Slot, owners: Sequence[Site | Stream], forms: Sequence[Form], selector: TokenSelector) -> Any:
        """A fake buffer as emissions see it, or a number that could be one: some K, some step."""
        owner, keep = owners[slot.position], forms[slot.position].keep
        if isinstance(slot.kind, State):
            return seen_buffer(slot.kind, slot.index, owner, keep, self.program, selector)
        return max(1, owner.axis.size // 2) if slot.kind is Number.K and isinstance(owner, Site) else 3

    def _propagate(self, variant: Variant, exemplar: Segment, forms: Sequence[Form], selector: TokenSelector) -> None:
        """Give every node of a variant its value, as fake tensors, with some K."""
        examples: list[Any] = [value_of(exemplar.inputs[i]) for i in variant.values]
        examples += [self._slot(slot, self._owners(exemplar), forms, selector) for slot in variant.slots]
        modes = {t.fake_mode for t in tensors(examples) if isinstance(t, torch._subclasses.FakeTensor)}
        originals = {n.meta[CAPTURED_AS]: n for n in exemplar.nodes}
        with modes.pop() if modes else torch.no_grad():
            given = iter(examples)
            for node in variant.module.graph.nodes:
                if node.op == "placeholder":
                    node.meta["val"] = next(given)
                elif node.op == "call_function" and not _as_captured(node, originals.get(node.meta.get(CAPTURED_AS))):
                    node.meta["val"] = self._value(node)

    def _value(self, call: fx.Node) -> Any:
        """The fake result of a call. Such calls are the dearest part of building a variant, so like ones share one."""
        args, kwargs = fx.node.map_arg((call.args, call.kwargs), value_of)
        key = (call.target, _typed(args), _typed(kwargs))
        if key not in self._values:
            self._values[key] = call.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[key]


def _storage(slot: Slot, forms: Sequence[Form]) -> Storage | None:
    """How a buffer lies in memory, if it holds values of the model."""
    kind = slot.kind
    return storage_of(kind, slot.index, forms[slot.position].keep) if isinstance(kind, State) else None


def _example(node: fx.Node) -> Any:
    """A fake tensor as the graph will see the value: inputs as they are, what segments compute contiguous."""
    value = value_of(node)
    if node.op in ("placeholder", "get_attr") or not isinstance(value, torch.Tensor):
        return value
    lies = torch.empty(value.shape, device="meta").stride()
    return value if value.stride() == lies else value.new_empty(value.shape)


def _as_captured(node: fx.Node, original: fx.Node | None) -> bool:
    """Whether a copy of a node of the captured graph still has the value that it was captured with: none of its
    operands has another type. Most of a variant is that."""
    if original is None or "val" not in node.meta:
        return False
    ours, theirs = node.all_input_nodes, original.all_input_nodes
    return len(ours) == len(theirs) and all(_alike(value_of(a), value_of(b)) for a, b in zip(ours, theirs, strict=True))


def _alike(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _typed(a) == _typed(b)


def _typed(value: Any) -> Any:
    """What a fake call can know of an argument, hashable."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device, value.stride()
    if isinstance(value, (list, tuple)):
        return tuple(map(_typed, value))
    if isinstance(value, dict):
        return tuple((key, _typed(item)) for key, item in value.items())
    return type(value), value
