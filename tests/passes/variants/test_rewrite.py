"""Golden results of each pass on one small block, and what the pass manager does with a broken one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import PassError, ToCa, VerifyError
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.ir.actions import Compute, Keep, Partial, Reuse, legal_actions
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.plan import Selector
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Form, Pass, Program
from toca_compile.ir.spec import AxisSpec, elementwise
from toca_compile.passes.variants.rewrite import rewrite
from toca_compile.rules.registry import RULES

aten = torch.ops.aten


class Tiny(nn.Module):
    """Patches of a 4×6 picture, attention and MLP twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, stride=2)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(4, 12), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2)
        )

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            q, k, v = layer["qkv"](h)[:, None].chunk(3, -1)
            h = h + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            h = h + gate * layer["down"](nn.functional.relu(layer["up"](h)))
        return h


def unit_of(model: nn.Module, *inputs: Tensor) -> Program:
    found: list[Program] = []

    def backend(gm: fx.GraphModule, args: list[Any]) -> Any:
        static = tuple(isinstance(a, nn.Parameter) for a in args)
        found.append(PassManager(PIPELINE).run(Program(gm, static, tuple(args))))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return found[0]


@pytest.fixture
def program() -> Program:
    return unit_of(Tiny().eval(), torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))


def test_capture(program: Program) -> None:
    text = print_graph(program.module.graph).split("\n")
    assert_expected_inline(
        "\n".join([t for t in text if "input" not in t][:17]),
        """\
conv2d = conv2d(arg2_1, arg0_1, arg1_1, [2, 2])  # [2, 4, 2, 3]
view = reshape(conv2d, [2, 4, 6])  # [2, 4, 6]
transpose = transpose.int(view, 1, 2)  # [2, 6, 4]
linear = linear(transpose, arg3_1, arg4_1)  # [2, 6, 12]
unsqueeze = unsqueeze(linear, 1)  # [2, 1, 6, 12]
split = split.Tensor(unsqueeze, 4, -1)
getitem = getitem(split, 0)  # [2, 1, 6, 4]
getitem_1 = getitem(split, 1)  # [2, 1, 6, 4]
getitem_2 = getitem(split, 2)  # [2, 1, 6, 4]
scaled_dot_product_attention = scaled_dot_product_attention(getitem, getitem_1, getitem_2)  # [2, 1, 6, 4]
squeeze = squeeze.dim(scaled_dot_product_attention, 1)  # [2, 6, 4]
add = add.Tensor(transpose, squeeze)  # [2, 6, 4]
linear_1 = linear(add, arg5_1, arg6_1)  # [2, 6, 8]
relu = relu(linear_1)  # [2, 6, 8]
linear_2 = linear(relu, arg7_1, arg8_1)  # [2, 6, 4]
mul = mul.Tensor(arg9_1, linear_2)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]""",
    )


def test_infer_axes(program: Program) -> None:
    """h and w are the picture's axes in tokens; the residual stream and the attention share them."""
    assert program.types is not None
    lines = []
    for node in program.module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            lines.append(f"{node.name}: {' '.join(str(d) for d in program.types.type_of(node))}")
    assert_expected_inline(
        "\n".join(lines[:11]),
        """\
conv2d: (4,) (0,) (27,) (28,)
view: (4,) (0,) (27, 28)
transpose: (4,) (27, 28) (0,)
linear: (4,) (27, 28) (7,)
unsqueeze: (4,) () (27, 28) (7,)
getitem: (4,) () (27, 28) (29,)
getitem_1: (4,) () (27, 28) (29,)
getitem_2: (4,) () (27, 28) (0,)
scaled_dot_product_attention: (4,) () (27, 28) (0,)
squeeze: (4,) (27, 28) (0,)
add: (4,) (27, 28) (0,)""",
    )


def test_find_sites(program: Program) -> None:
    lines = [
        f"{s.index} {s.kind} axis={s.axis.size} grid={s.axis.grid} {s.source}..{s.output} -> {s.add} "
        f"score={s.score_by_keys and s.score_by_keys.site} block={s.block} depth={s.depth}/{s.depths} actions={sorted(legal_actions(s))}"
        for s in program.sites
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
0 self_attention axis=6 grid=(2, 3) transpose..squeeze -> add score=0 block=0 depth=0/2 actions=['compute', 'forecast', 'queries', 'reuse', 'skip']
1 mlp axis=6 grid=(2, 3) add..linear_2 -> add_1 score=0 block=0 depth=0/2 actions=['compute', 'forecast', 'partial', 'reuse', 'skip']
2 self_attention axis=6 grid=(2, 3) add_1..squeeze_1 -> add_2 score=2 block=1 depth=1/2 actions=['compute', 'forecast', 'queries', 'reuse', 'skip']
3 mlp axis=6 grid=(2, 3) add_2..linear_5 -> add_3 score=2 block=1 depth=1/2 actions=['compute', 'forecast', 'partial', 'reuse', 'skip']""",
    )


def test_find_attention(program: Program) -> None:
    assert [(a.node.name, a.axis == a.key_axis, a.map) for a in program.attentions] == [
        ("scaled_dot_product_attention", True, None),
        ("scaled_dot_product_attention_1", True, None),
    ]


def test_outline(program: Program) -> None:
    lines = [
        f"template {s.template} sites {s.sites}: {[n.name for n in s.nodes]} -> {list(s.outputs)}"
        for s in program.segments
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
template 0 sites (): ['conv2d', 'view', 'transpose'] -> [transpose]
template 1 sites (0, 1): ['linear', 'unsqueeze', 'split', 'getitem', 'getitem_1', 'getitem_2', 'scaled_dot_product_attention', 'squeeze', 'add', 'linear_1', 'relu', 'linear_2', 'mul', 'add_1'] -> [add_1]
template 1 sites (2, 3): ['linear_3', 'unsqueeze_1', 'split_1', 'getitem_3', 'getitem_4', 'getitem_5', 'scaled_dot_product_attention_1', 'squeeze_1', 'add_2', 'linear_4', 'relu_1', 'linear_5', 'mul_1', 'add_3'] -> [add_3]""",
    )


REUSED, ROWS = Form(Reuse(), Keep(CacheSpec())), Form(Partial(), Keep(CacheSpec()))


def variant(program: Program, *forms: Form, dense: bool = False) -> str:
    segment = next(s for s in program.segments if s.sites)
    assert program.types is not None
    made = rewrite(
        segment, [program.sites[i] for i in segment.sites], forms, program.types, Selector(weight=0.1), dense=dense
    )
    return print_graph(made.module.graph)


def test_rewrite_partial(program: Program) -> None:
    assert_expected_inline(
        variant(program, REUSED, ROWS),
        """\
in0_transpose = input  # [2, 6, 4]
in3_arg5_1 = input  # [8, 4]
in4_arg6_1 = input  # [8]
in5_arg7_1 = input  # [4, 8]
in6_arg8_1 = input  # [4]
in7_arg9_1 = input  # [2, 1, 4]
cache0 = input
cache1 = input
stamp1 = input
step1 = input
score0 = input
k1 = input
since1 = input
add = add.Tensor(in0_transpose, cache0)  # [2, 6, 4]
unit_scores_default = toca.unit_scores(score0)
select_tokens_default = toca.select_tokens(unit_scores_default, stamp1, k1, step1, since1, 0.1, [], 1, 0.0)
mark_fresh__default = toca.mark_fresh_(stamp1, select_tokens_default, step1)
gather_tokens_default = toca.gather_tokens(add, select_tokens_default, 1, 0)
linear_1 = linear(gather_tokens_default, in3_arg5_1, in4_arg6_1)
relu = relu(linear_1)
linear_2 = linear(relu, in5_arg7_1, in6_arg8_1)
scatter_tokens__default = toca.scatter_tokens_(cache1, select_tokens_default, linear_2, 1, 0)
mul = mul.Tensor(in7_arg9_1, scatter_tokens__default)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )


def test_rewrite_partial_dense(program: Program) -> None:
    assert_expected_inline(
        variant(program, REUSED, ROWS, dense=True),
        """\
in0_transpose = input  # [2, 6, 4]
in3_arg5_1 = input  # [8, 4]
in4_arg6_1 = input  # [8]
in5_arg7_1 = input  # [4, 8]
in6_arg8_1 = input  # [4]
in7_arg9_1 = input  # [2, 1, 4]
cache0 = input
cache1 = input
stamp1 = input
step1 = input
score0 = input
k1 = input
since1 = input
add = add.Tensor(in0_transpose, cache0)  # [2, 6, 4]
linear_1 = linear(add, in3_arg5_1, in4_arg6_1)  # [2, 6, 8]
relu = relu(linear_1)  # [2, 6, 8]
unit_scores_default = toca.unit_scores(score0)
select_tokens_default = toca.select_tokens(unit_scores_default, stamp1, k1, step1, since1, 0.1, [], 1, 0.0)
mark_fresh__default = toca.mark_fresh_(stamp1, select_tokens_default, step1)
linear_2 = linear(relu, in5_arg7_1, in6_arg8_1)  # [2, 6, 4]
blend_tokens__default = toca.blend_tokens_(cache1, select_tokens_default, linear_2, 1, 0)
mul = mul.Tensor(in7_arg9_1, blend_tokens__default)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )


def test_rewrite_full(program: Program) -> None:
    assert_expected_inline(
        variant(program, Form(Compute(), Keep(CacheSpec(), score=True)), Form(Compute(), Keep(CacheSpec()))),
        """\
in0_transpose = input  # [2, 6, 4]
in1_arg3_1 = input  # [12, 4]
in2_arg4_1 = input  # [12]
in3_arg5_1 = input  # [8, 4]
in4_arg6_1 = input  # [8]
in5_arg7_1 = input  # [4, 8]
in6_arg8_1 = input  # [4]
in7_arg9_1 = input  # [2, 1, 4]
score0 = input
cache0 = input
cache1 = input
linear = linear(in0_transpose, in1_arg3_1, in2_arg4_1)  # [2, 6, 12]
unsqueeze = unsqueeze(linear, 1)  # [2, 1, 6, 12]
split = split.Tensor(unsqueeze, 4, -1)
getitem = getitem(split, 0)  # [2, 1, 6, 4]
getitem_1 = getitem(split, 1)  # [2, 1, 6, 4]
getitem_2 = getitem(split, 2)  # [2, 1, 6, 4]
scaled_dot_product_attention = scaled_dot_product_attention(getitem, getitem_1, getitem_2)  # [2, 1, 6, 4]
squeeze = squeeze.dim(scaled_dot_product_attention, 1)  # [2, 6, 4]
attention_received_default = toca.attention_received(getitem, getitem_1, None, None, False, 1)
sum_dim_int_list = sum.dim_IntList(attention_received_default, [1])
store__default = toca.store_(score0, sum_dim_int_list)
store__default_1 = toca.store_(cache0, squeeze)
add = add.Tensor(in0_transpose, squeeze)  # [2, 6, 4]
linear_1 = linear(add, in3_arg5_1, in4_arg6_1)  # [2, 6, 8]
relu = relu(linear_1)  # [2, 6, 8]
linear_2 = linear(relu, in5_arg7_1, in6_arg8_1)  # [2, 6, 4]
store__default_2 = toca.store_(cache1, linear_2)
mul = mul.Tensor(in7_arg9_1, linear_2)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )


def test_rewrite_reuse(program: Program) -> None:
    assert_expected_inline(
        variant(program, REUSED, REUSED),
        """\
in0_transpose = input  # [2, 6, 4]
in7_arg9_1 = input  # [2, 1, 4]
cache0 = input
cache1 = input
add = add.Tensor(in0_transpose, cache0)  # [2, 6, 4]
mul = mul.Tensor(in7_arg9_1, cache1)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )


def test_plain_is_the_model(program: Program) -> None:
    assert "toca" not in variant(program, Form(Compute(), Keep()), Form(Compute(), Keep()))


# -- broken on purpose ------------------------------------------------------------------------------------------------


def breaking(**change: Any) -> Pass:
    def broken_pass(program: Program) -> Program:
        return replace(program, **{k: f(program) for k, f in change.items()})

    return Pass(broken_pass)


def mutates(program: Program) -> fx.GraphModule:
    graph = program.module.graph
    node = next(n for n in graph.nodes if n.target is aten.relu.default)
    with graph.inserting_after(node):
        graph.call_function(aten.relu_.default, (node,)).meta.update(node.meta)
    return program.module


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (breaking(module=mutates), "mutates"),
        (breaking(segments=lambda u: u.segments[:-1]), "no segment computes"),
        (breaking(segments=lambda u: u.segments[::-1]), "runs before its inputs"),
        (
            breaking(sites=lambda u: (replace(u.sites[0], source=u.sites[0].output), *u.sites[1:])),
            "inside its own branch",
        ),
    ],
)
def test_a_broken_pass_is_named(broken: Pass, says: str) -> None:
    with pytest.raises(PassError, match=rf"broken-pass failed after capture, .*{says}"):
        broken_unit((*PIPELINE, broken))


def broken_unit(passes: tuple[Pass, ...]) -> None:
    errors: list[Exception] = []

    def backend(gm: fx.GraphModule, args: list[Any]) -> Any:
        try:
            PassManager(passes).run(Program(gm, tuple(isinstance(a, nn.Parameter) for a in args), tuple(args)))
        except PassError as error:
            errors.append(error)
        return gm.forward

    with torch.no_grad():
        torch.compile(Tiny().eval(), backend=backend)(torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))
    raise errors[0]


class Mixing(PlainDiT):
    """Its MLPs look at all tokens: a cumulative sum before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = nn.Sequential(Cumulative(), *block.mlp)


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def test_a_branch_that_mixes_tokens_is_never_partial() -> None:
    model = randomize(Mixing())
    opt = toca_compile.optimize(model, ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant"), lowering="eager")
    sample(opt, 4, noise())
    assert not any("partial" in s.actions for s in toca_compile.explain(opt).sites)
    assert "cumsum" in str(toca_compile.explain(opt).sites[1].reason)


def test_a_wrong_rule_is_caught_by_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """With cumsum called pointwise the proof goes through; the numeric check then refuses the variant."""

    def wrong(call: Any) -> AxisSpec:
        return elementwise(call.operands, call.results)

    monkeypatch.setitem(RULES, aten.cumsum.default, replace(RULES[aten.cumsum.default], axes=wrong))
    opt = toca_compile.optimize(
        randomize(Mixing()), ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant"), lowering="eager"
    )
    with pytest.raises(VerifyError, match="not its dense meaning"):
        sample(opt, 4, noise())


def test_graphs_are_printed_on_request() -> None:
    opt = toca_compile.optimize(
        randomize(PlainDiT()), ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant"), lowering="eager"
    )
    sample(opt, 4, noise())
    graphs = toca_compile.explain(opt).graphs()
    assert list(graphs)[:5] == ["capture", "infer-axes", "find-attention", "find-sites", "outline"]
    assert "toca.scatter_tokens_" in graphs["template1[reuse; partial]"]
