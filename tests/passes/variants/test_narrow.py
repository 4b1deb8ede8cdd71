"""Narrow: of a linear layer that makes several things, a step computes the features that it needs."""

from typing import Any

import torch
from torch import Tensor, nn

import toca_compile
from tests.programs import REUSED, ROWS, Tiny, program_of, variant_of
from toca_compile import Fora
from toca_compile.ir.actions import Compute, Keep
from toca_compile.ir.program import Form
from toca_compile.passes.variants.narrow import Piece, pieces

aten = torch.ops.aten


class Cut(Tiny):
    """Queries, keys and values are cut from one layer's output before anything else happens to it."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            q, k, v = (part[:, None] for part in layer["qkv"](h).chunk(3, -1))
            h = h + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            h = h + gate * layer["down"](nn.functional.relu(layer["up"](h)))
        return h


def test_queries_alone_need_a_third_of_the_rows() -> None:
    program = program_of(Cut(), torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))
    assert program.types is not None
    node = {n.name: n for n in program.module.graph.nodes}
    linear, split = node["linear"], node["split"]
    q, k, v = (node[name] for name in ("getitem", "getitem_1", "getitem_2"))
    assert pieces({linear, split, q}, program.types) == {q: Piece(linear, 0, 4)}
    assert pieces({linear, split, k, v}, program.types) == {k: Piece(linear, 4, 4), v: Piece(linear, 8, 4)}
    assert pieces({linear, split, q, k, v}, program.types) == {}  # all of it
    assert pieces({node["linear_1"], node["relu"]}, program.types) == {}  # nothing is cut


class Modulated(nn.Module):
    """Shifts, scales and gates of two branches, six pieces of one layer of the conditioning; ``whole``: a seventh use of
    that layer, all of it."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.embed, self.whole = nn.Conv2d(1, 4, 2, stride=2), whole
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "modulation": nn.Linear(4, 24), "qkv": nn.Linear(4, 12), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4),
            })
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            made = layer["modulation"](nn.functional.silu(time))
            shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in made.chunk(6, -1))
            if self.whole:
                gate2 = gate2 + made.mean(-1, keepdim=True)[:, None]
            q, k, v = layer["qkv"](h * scale1 + shift1)[:, None].chunk(3, -1)
            h = h + gate1 * nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            h = h + gate2 * layer["down"](nn.functional.relu(layer["up"](h * scale2 + shift2)))
        return h


def widths(*forms: Form, whole: bool = False) -> list[int]:
    """How many features the layers of the conditioning make in a block whose sites do what ``forms`` says."""
    program = program_of(Modulated(whole=whole), torch.randn(2, 1, 4, 6), torch.randn(2, 4))
    nodes = variant_of(program, *forms).module.graph.nodes
    return [_rows(n.args[1]) for n in nodes if n.target is aten.linear.default and "silu" in n.args[0].name]


def _rows(weight: Any) -> int:
    if weight.target is aten.slice.Tensor:
        return int(weight.args[3] - weight.args[2])
    return int(weight.meta["val"].shape[0])


PLAIN = Form(Compute(), Keep())


def test_a_step_that_reuses_all_makes_the_gates_alone() -> None:
    assert widths(REUSED, REUSED) == [4, 4]


def test_pieces_side_by_side_are_one_product() -> None:
    assert widths(REUSED, ROWS) == [16]  # the first gate; shift, scale and gate of the MLP
    assert widths(PLAIN, REUSED) == [12, 4]


def test_what_is_read_whole_is_made_whole() -> None:
    assert widths(PLAIN, PLAIN) == [24]
    assert widths(REUSED, REUSED, whole=True) == [24]


def test_pieces_are_what_the_whole_layer_makes() -> None:
    """A product of another shape may differ in the last bits."""
    opt = toca_compile.optimize(Modulated().eval(), Fora(3, 3), lowering="eager")
    dense = toca_compile.optimize(opt._orig_mod, Fora(3, 3), lowering="dense")
    x = torch.randn(2, 1, 4, 6)
    with torch.no_grad():
        for call in range(3):
            time = torch.full((2, 4), 1.0 - call / 3)
            with opt.cache_context("run", step_index=call), dense.cache_context("run", step_index=call):
                torch.testing.assert_close(opt(x, time), dense(x, time))
    assert [step.kind.value for step in opt.steps] == ["full", "reuse", "reuse"]
