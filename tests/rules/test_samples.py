"""Every rule, by its own samples: carried labels commute with restriction, mixed ones have a counterexample."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toca_compile.rules  # noqa: F401
from tests.harness import called, check, claims, draw_index, merges
from tests.versions import newer
from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, Window, einsum, elementwise, over_dims, regroup
from toca_compile.rules.registry import RULES, Args, Rule, Sample, register

aten = torch.ops.aten

# Ops whose sample has no meaningful values to compare, with the reason.
VALUELESS = {
    aten.empty.memory_format: "uninitialised memory",
    aten.empty_like.default: "uninitialised memory",
    aten.rand.default: "random values",
    aten.randn.default: "random values",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: "another process's values: tests/distributed",
    aten._scaled_dot_product_flash_attention.default: "runs on GPUs alone",
    aten._scaled_dot_product_cudnn_attention.default: "runs on GPUs alone",
}
if not newer("2.13"):
    VALUELESS[torch.ops._c10d_functional.all_to_all_single.default] = "torch's stand-in for processes exchanges nothing"
OPS = [op for op in RULES if op not in VALUELESS]


def wrong_claims(rule: Rule, rng: Random, sample: Sample) -> list[str]:
    """Labels that the rule calls carried (or a window, or a concatenation) and that are not, in a call that it draws.

    Raises:
        RuleError: the rule does not cover the call.
    """
    torch.manual_seed(rng.randint(0, 2**16))
    args, kwargs = sample(rng)
    spec = rule.spec(Call(args, kwargs, called(rule, args, kwargs)))
    outcome = check(rule, args, kwargs, lambda size: draw_index(rng, size))
    return [f"{label} of {described(args)}" for label, holds in outcome.items() if label in claims(spec) and not holds]


def described(args: Any) -> str:
    """Arguments with shapes in the place of tensors."""
    return str(torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: list(t.shape), args))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_carried_labels_commute(op: torch._ops.OpOverload) -> None:
    rule = RULES[op]

    # As many calls again, and more, are drawn below: there the seeds are always the same, here never.
    @settings(max_examples=10 if rule.pointwise else 25, deadline=None)
    @given(rng=st.randoms(use_true_random=False), sample=st.sampled_from(rule.samples))
    def run(rng: Random, sample: Sample) -> None:
        try:
            assert not wrong_claims(rule, rng, sample)
        except RuleError:
            return  # it claims nothing; that it covers calls at all is seen below

    run()


@pytest.mark.parametrize("op", OPS, ids=str)
def test_mixed_labels_have_a_counterexample(op: torch._ops.OpOverload) -> None:
    """A rule that calls too much mixed would be sound and useless: each claim is shown by one sample at least."""
    rule = RULES[op]
    claimed: set[tuple[int, str]] = set()
    refuted: set[tuple[int, str]] = set()
    for which, sample in enumerate(rule.samples):
        covered = 0
        for seed in range(10 if rule.pointwise else 30):
            rng = Random(seed)
            torch.manual_seed(seed)
            args, kwargs = sample(rng)
            try:
                spec = rule.spec(Call(args, kwargs, op(*args, **kwargs)))
            except RuleError:
                continue
            outcome = check(rule, args, kwargs, lambda size, rng=rng: draw_index(rng, size))
            assert all(holds for label, holds in outcome.items() if label in claims(spec)), described(args)
            claimed |= {(which, x) for x in outcome if x in spec.mixed}
            refuted |= {(which, x) for x, commutes in outcome.items() if x in spec.mixed and not commutes}
            covered += 1
        assert covered >= 5
    assert claimed == refuted


@pytest.mark.parametrize("op", [op for op in OPS if RULES[op].pointwise or RULES[op].trailing], ids=str)
def test_dimensions_before_its_own_may_be_merged(op: torch._ops.OpOverload) -> None:
    rule = RULES[op]
    for seed in range(10):
        for sample in rule.samples:
            torch.manual_seed(seed)
            assert merges(rule, *sample(Random(seed)))


@pytest.mark.parametrize("options", [(), (None, True)], ids=["flash", "cudnn"])
def test_attentions_of_gpus_that_tell_their_sums_are_covered(options: tuple[Any, ...]) -> None:
    """By their shapes alone. All that is told beside the output is made of the query's samples, heads and rows."""
    op = aten._scaled_dot_product_cudnn_attention if options else aten._scaled_dot_product_flash_attention
    args = (*(torch.empty(2, 3, n, 8, device="meta", dtype=torch.float16) for n in (4, 5, 5)), *options)
    spec = RULES[op.default].spec(Call(args, {}, op(*args)))
    assert {"b", "h", "q"} <= spec.carried
    assert not {"k", "d", "e"} & spec.carried


def _shift_of_the_same_size(call: Call) -> AxisSpec:
    (x,), (y,) = call.operands, call.results
    names = [f"d{i}" for i in range(len(x))]
    out = [n if a == b else f"p{n}" for n, a, b in zip(names, x, y, strict=True)]
    return einsum(f"{' '.join(names)} -> {' '.join(out)}", call.operands, call.results)


def _shifts_as_dims(call: Call) -> AxisSpec:
    dims = call.args[2] if len(call.args) > 2 else call.args[1]
    return over_dims(call.operands[0], dims, call.results, keep=True)


def _first_place(call: Call) -> AxisSpec:
    """Of the letters that an operand has twice, the first place is the dimension of the result."""
    left, _, right = call.args[0].partition("->")
    terms = [[c + "'" * t[:i].count(c) for i, c in enumerate(t)] for t in left.split(",")]
    return einsum(",".join(map(" ".join, terms)) + "->" + " ".join(right), call.operands, call.results)


def _gathered(call: Call) -> AxisSpec:
    """That an index has less than the value along a dimension is nothing to it."""
    x, index = call.operands
    dim = normal_dims(call.args[1], len(x))[0]
    left = [f"d{i}" if i != dim and a == b else f"x{i}" for i, (a, b) in enumerate(zip(x, index, strict=True))]
    right = [f"d{i}" if i != dim and a == b else f"i{i}" for i, (a, b) in enumerate(zip(x, index, strict=True))]
    return einsum(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(right)}", call.operands, call.results)


def _negative_start(call: Call) -> AxisSpec:
    spec = RULES[aten.narrow.default].axes(call)
    return replace(spec, windows={n: Window(w.source, call.args[2], w.step) for n, w in spec.windows.items()})


def _no_step(call: Call) -> AxisSpec:
    spec = RULES[aten.slice.Tensor].axes(call)
    return replace(spec, windows={n: Window(w.source, w.start) for n, w in spec.windows.items()})


def _backwards(call: Call) -> AxisSpec:
    spec = RULES[aten.cat.default].axes(call)
    return replace(spec, concat={n: parts[::-1] for n, parts in spec.concat.items()})


def _one_left_out(call: Call) -> AxisSpec:
    """A segment of one element counted as none."""
    spec = RULES[aten.cat.default].axes(call)
    return replace(
        spec, concat={n: tuple(p for p in parts if spec.sizes[p] != 1) for n, parts in spec.concat.items()}
    )  # fmt: skip


def _written_in_place(call: Call) -> AxisSpec:
    """Each index of the result needs that index of the value, and the part for nothing."""
    x, _ = call.operands
    left, inner = (" ".join(f"{letter}{i}" for i in range(len(x))) for letter in "dp")
    return einsum(f"{left}, {inner} -> {left}", call.operands, call.results)


def _written_first(call: Call) -> AxisSpec:
    spec = RULES[aten.slice_scatter.default].axes(call)
    order = {n: sorted(parts, key="new".__ne__) for n, parts in spec.concat.items()}
    return replace(spec, concat={n: tuple(parts) for n, parts in order.items()})


def _unmixed(op: torch._ops.OpOverload) -> Callable[[Call], AxisSpec]:
    """The rule of an op with all that it calls mixed called carried."""
    return lambda call: replace(RULES[op].axes(call), mixed=frozenset())


def _like_the_operand(call: Call) -> AxisSpec:
    return elementwise(call.operands, call.results)


def _regrouped(call: Call) -> AxisSpec:
    return regroup(call.operands[0], call.results[0])


def _by_size(call: Call) -> AxisSpec:
    """A dimension of a view is the operand's that has its size."""
    (x,), (y,) = call.operands, call.results
    left = {size: f"d{i}" for i, size in enumerate(x)}
    names = [left[s] if left.get(s) == f"d{i}" else f"x{i}" for i, s in enumerate(x)]
    out = [left.pop(s, f"y{i}") for i, s in enumerate(y)]
    return einsum(f"{' '.join(names)} -> {' '.join(out)}", call.operands, call.results)


def _windows_by_rows(call: Call) -> AxisSpec:
    """A window that keeps a picture's size called pointwise."""
    return einsum("... h w -> ... h w", call.operands, call.results)


def _indices_in_place(call: Call) -> AxisSpec:
    """The dimensions of indices stand where the first of those is that they index, neighbours or not."""
    (x, *indices), picks = call.operands, call.args[1]
    named = [d for d, t in enumerate(picks) if t is not None]
    rank = max(map(len, indices))
    left = " ".join(f"x{d}" if d in named else f"d{d}" for d in range(len(x)))
    rows = [" ".join(f"r{i}" for i in range(rank - len(t), rank)) for t in indices]
    out = [*(f"d{d}" for d in range(named[0])), *(f"r{i}" for i in range(rank))]
    out += [f"d{d}" for d in range(named[0], len(x)) if d not in named]
    return einsum(f"{left}, {', '.join(rows)} -> {' '.join(out)}", call.operands, call.results)


def _source_by_place(call: Call) -> AxisSpec:
    """That a source has more than the index along a dimension is nothing to what is scattered."""
    spec = RULES[aten.scatter.src].axes(call)
    (x, index, _), dim = call.operands, normal_dims(call.args[1], len(call.operands[0]))[0]
    same = {i for i, (a, b) in enumerate(zip(x, index, strict=True)) if a == b and i != dim}
    names = [
        " ".join(f"d{i}" if i in same and letter != "s" else f"{letter}{i}" for i in range(len(x))) for letter in "xis"
    ]
    out = " ".join(f"d{i}" if i in same else f"x{i}!" for i in range(len(x)))
    return einsum(f"{','.join(names)} -> {out}", call.operands, [x]) if same else spec


def _tiles_minor(call: Call) -> AxisSpec:
    spec = RULES[aten.repeat.default].axes(call)
    return replace(spec, results=tuple(tuple(dim[::-1] for dim in dims) for dims in spec.results))


def _k_as_dim(call: Call) -> AxisSpec:
    return RULES[aten.sort.default].axes(Call(call.args[:2], {}, call.result))


WRONG: dict[str, tuple[torch._ops.OpOverload, Callable[[Call], AxisSpec]]] = {
    "a pad that keeps the size": (aten.pad.default, _shift_of_the_same_size),
    "zeros that keep the size": (aten.constant_pad_nd.default, _shift_of_the_same_size),
    "shifts read as dims": (aten.roll.default, _shifts_as_dims),
    "a roll": (aten.roll.default, _unmixed(aten.roll.default)),
    "a flip": (aten.flip.default, _unmixed(aten.flip.default)),
    "softmax": (aten.softmax.int, _like_the_operand),
    "cumsum": (aten.cumsum.default, _like_the_operand),
    "a triangle": (aten.tril.default, _like_the_operand),
    "sorting": (aten.argsort.default, _like_the_operand),
    "k read as a dimension": (aten.topk.default, _k_as_dim),
    "causal attention": (aten.scaled_dot_product_attention.default, _unmixed(aten.scaled_dot_product_attention.default)),
    "slopes along the last dimension": (aten.prelu.default, _like_the_operand),
    "a diagonal": (aten.einsum.default, _first_place),
    "an index that has less": (aten.gather.default, _gathered),
    "indices that are no neighbours": (aten.index.Tensor, _indices_in_place),
    "elements written by index": (aten.scatter.src, _unmixed(aten.scatter.src)),
    "rows added by index": (aten.index_add.default, _unmixed(aten.index_add.default)),
    "elements put by index": (aten.index_put.default, _unmixed(aten.index_put.default)),
    "a source that has more than the index": (aten.scatter_add.default, _source_by_place),
    "tiles as the minor factor": (aten.repeat.default, _tiles_minor),
    "a start counted from the end": (aten.narrow.default, _negative_start),
    "a step": (aten.slice.Tensor, _no_step),
    "segments in another order": (aten.cat.default, _backwards),
    "a window written over": (aten.slice_scatter.default, _written_in_place),
    "a window that is written where it was not": (aten.slice_scatter.default, _written_first),
    "a segment of one element": (aten.cat.default, _one_left_out),
    "a dimension named to be squeezed": (aten.squeeze.dims, _regrouped),
    "groups of channels": (aten.conv1d.default, _unmixed(aten.conv1d.default)),
    "channels normalised in groups": (aten.group_norm.default, _unmixed(aten.group_norm.default)),
    "features normalised": (aten.layer_norm.default, _unmixed(aten.layer_norm.default)),
    "a pooling that keeps the size": (aten.avg_pool2d.default, _windows_by_rows),
    "a view": (aten.reshape.default, _by_size),
}  # fmt: skip


@pytest.mark.parametrize("what", list(WRONG))
def test_a_wrong_rule_is_caught(what: str) -> None:
    """Called carried, by the very samples that the right rule brings."""
    op, axes = WRONG[what]
    wrong = replace(RULES[op], axes=axes)
    for seed in range(60):
        for sample in wrong.samples:
            try:
                if wrong_claims(wrong, Random(seed), sample):
                    return
            except RuleError:
                continue
    pytest.fail(f"the samples of {op} do not show that {what} is not carried")


NOT_COVERED: dict[str, tuple[torch._ops.OpOverload, Args]] = {
    "one sample without a batch": (aten.conv1d.default, ((torch.ones(3, 5), torch.ones(2, 3, 1)), {})),
    "elements picked by a mask": (aten.index.Tensor, ((torch.ones(3), [torch.ones(3) > 0]), {})),
    "a value for each element that is true": (
        aten.index_put.default, ((torch.ones(3), [torch.ones(3) > 0], torch.ones(3)), {})),
    "as many classes as there are": (aten.one_hot.default, ((torch.arange(3),), {})),
    "a scalar index": (aten.index_select.default, ((torch.ones(3, 2), 0, torch.tensor(1)), {})),
    "dropout that drops": (aten.dropout.default, ((torch.ones(3), 0.5, True), {})),
    "nothing, seen as other nothing": (aten.view.default, ((torch.ones(2, 0, 6), [4, 0, 3]), {})),
}  # fmt: skip


@pytest.mark.parametrize("what", list(NOT_COVERED))
def test_a_rule_says_where_it_says_nothing(what: str) -> None:
    op, (args, kwargs) = NOT_COVERED[what]
    with pytest.raises(RuleError):
        RULES[op].spec(Call(args, kwargs, op(*args, **kwargs)))


@pytest.mark.parametrize("bad", [dict(stride=2), dict(padding=1), dict(weight=(2, 2, 2, 1))])
def test_a_convolution_of_single_positions_alone_carries_them(bad: dict[str, Any]) -> None:
    def carried(weight: tuple[int, ...] = (2, 2, 1, 1), stride: int = 1, padding: int = 0) -> frozenset[str]:
        args = (torch.ones(3, 2, 5, 4), torch.ones(weight), None, [stride] * 2, [padding] * 2)
        op = aten.conv2d.default
        return RULES[op].spec(Call(args, {}, op(*args))).carried

    assert carried() >= {"b", "s0", "s1"}
    assert carried(**bad) <= {"b", "o"}


def test_attention_that_drops_weights_carries_nothing() -> None:
    op, args = aten.scaled_dot_product_attention.default, (*[torch.ones(2, 3, 4, 5)] * 3, None, 0.5)
    assert not RULES[op].spec(Call(args, {}, op(*args))).carried


@pytest.mark.parametrize(
    "axes",
    [
        lambda call: einsum("b n n -> b n", call.operands, call.results),  # one label in two places
        lambda call: einsum("b n -> b n", call.operands, call.results),  # of another rank
        lambda call: AxisSpec((), ((("b",), ("n",)),), {"b": 2, "n": 3}),  # an operand too few
        lambda call: AxisSpec(((("b",), ("n",), ("m",)),), ((("b",), ("n",)),), {"b": 2, "n": 3, "m": 4}),  # sizes
        lambda call: {}["missing"],
    ],
)
def test_a_spec_that_cannot_be_is_none(axes: Callable[[Call], AxisSpec]) -> None:
    args = ("bnn->bn", [torch.ones(2, 3, 3)])
    with pytest.raises(RuleError):
        replace(RULES[aten.einsum.default], axes=axes).spec(Call(args, {}, torch.ones(2, 3)))


def test_duplicate_rules_are_refused() -> None:
    with pytest.raises(RuleError, match=r"add\.Tensor has a rule already"):

        @register(aten.add.Tensor)
        def again(call: Call) -> AxisSpec:
            raise NotImplementedError
