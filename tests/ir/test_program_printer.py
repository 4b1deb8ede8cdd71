"""ProgramPrinter: what is known after each pass, and what every value of a variant is."""

import re

import toca_compile
from tests.models import PlainDiT, randomize
from tests.programs import printed_stages
from tests.sampling import noise, sample
from toca_compile import ToCa
from toca_compile.compiler.pipeline import PIPELINE

NAMES = [p.name for p in PIPELINE]


def test_each_pass_shows_what_it_found(graphs: dict[str, str]) -> None:
    shown = {
        "capture": ["3 inputs, 32 parameters", "linear_3 = linear(add_3, arg13_1, arg14_1)", "f32[2, 16, 48]"],
        "infer-axes": ["[b, (d2 d3), d1]", "d5 = d4 + d4 = 16", "d9 d14 = 3", "every call has a rule"],
        "find-attention": ["scaled_dot_product_attention: queries (n n1) read keys (n n1), for each (b heads)"],
        "find-sites": [
            "1  blocks.0.mlp  mlp on image (h w), 4×4\n     add_4 -> linear_6 -> add_7",
            "may compute, forecast, partial, reuse, skip",
            "not partial: aten.scaled_dot_product_attention.default mixes the tokens",
            "[b, (h w), c]  // blocks.0.mlp, its output",
        ],
        "outline": ["template 1 ×2: 36 calls, blocks.0, blocks.0.mlp", "segment 2 = template 1("],
        "find-scores": ["blocks.1.mlp: as keys of blocks.1"],
        "find-clock": ["// find-clock: told by arg4_1", "arg4_1: i64[2] [b]"],
        "hoist": ["// hoist: nothing to do once a run"],
    }  # fmt: skip
    for i, name in enumerate(NAMES):
        for words in shown[name]:
            assert words in graphs[name]
            assert i == 0 or words not in graphs[NAMES[i - 1]]


def test_every_value_of_a_variant_has_a_type(graphs: dict[str, str]) -> None:
    text = graphs["template1[reuse; partial]"]
    assert text.startswith("// template 1: blocks.0 reuse; blocks.0.mlp partial\n")
    lines = [line for line in text.splitlines() if " = " in line and not line.startswith("//")]
    assert all(re.search(r" : (int|(\d+ × )?[a-z]+\d+\[[\d, ]*\] \[.*\])", line) for line in lines), text
    assert re.search(r"cache1 = buffer cache of blocks\.0\.mlp +: f32\[2, 16, 16\] \[b, \(h w\), c\]", text)
    assert re.search(r"k1 = number k of blocks\.0\.mlp +: int$", text, re.M)
    assert re.search(r"gather_tokens_default = .*\[b, K, c\]", text)


def test_texts_are_the_same_in_two_runs(graphs: dict[str, str]) -> None:
    assert printed_stages() == graphs


def test_graphs_are_printed_on_request() -> None:
    opt = toca_compile.optimize(
        randomize(PlainDiT()), ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant"), lowering="eager"
    )
    sample(opt, 4, noise())
    graphs = toca_compile.explain(opt).graphs()
    assert list(graphs)[:5] == ["capture", "infer-axes", "find-attention", "find-sites", "outline"]
    assert "toca.scatter_tokens_" in graphs["template1[reuse; partial]"]
