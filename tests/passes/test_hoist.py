"""Hoist: what does not change during a run is computed once, and anew when what it is made from changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, Texted, randomize
from tests.programs import program_of, reading_program
from tests.runs import optimized
from tests.sampling import noise
from toca_compile import Fora
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.ir.graph import value_of
from toca_compile.ir.program import Program

aten = torch.ops.aten


def test_keys_and_values_of_the_text_stand_first(program: Program) -> None:
    first, *others = reading_program().segments
    assert first.constant
    assert aten.linear.default in [n.target for n in first.nodes]
    assert not any(s.constant for s in others)
    assert not any(s.constant for s in program.segments)  # nothing is read but the picture


def test_shifts_scales_and_gates_stand_first() -> None:
    """Those of each block as a segment of its own, all the same graph; the model's own behind what they are made of."""
    program = program_of(randomize(PlainDiT(depth=3)), noise(), torch.full((2,), 500), torch.arange(2))
    outside, *blocks = [s for s in program.segments if s.timed]
    assert outside.nodes[0] not in {n for s in blocks for n in s.nodes}
    assert len({s.template for s in blocks}) == 1
    assert [aten.linear.default in [n.target for n in s.nodes] for s in blocks] == [True] * 3
    assert all(s.in_block for s in blocks)
    behind = program.segments[len(blocks) + 1 :]
    assert not any(s.timed for s in behind)
    made = {n for s in (outside, *blocks) for n in s.outputs}
    read = [n for s in behind for n in s.inputs if n in made]
    assert all(value_of(n).shape in ((2, 1, 16), (2, 16)) for n in read)


class OverTokens(nn.Module):
    """Adds its embedding of the time to every token, and that is nothing that is kept by time."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.qkv = nn.Linear(1, 8), nn.Linear(8, 24)
        self.places = nn.Parameter(torch.randn(1, 12, 8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        added = self.time(t.sin()[:, None])[:, None] * self.places
        q, k, v = self.qkv(x + added).reshape(2, 12, 3, 8).permute(2, 0, 1, 3)[:, :, None]
        return x + added * nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


def test_what_has_tokens_is_made_at_each_step() -> None:
    program = program_of(OverTokens(), torch.randn(2, 12, 8), torch.ones(2))
    (timed,) = (s for s in program.segments if s.timed)
    assert [tuple(value_of(n).shape) for n in timed.outputs] == [(2, 1, 8)]


def test_what_is_hoisted_is_shown(tmp_path: Path) -> None:
    manager = PassManager(PIPELINE, dump_dir=tmp_path)
    reading_program(manager)
    assert "// hoist: 1 segment of 5 calls once a run" in manager.graphs["hoist"]
    assert "constant during a run" in manager.graphs["hoist"]
    assert "constant during a run" not in manager.graphs["find-clock"]
    files = {f"{i:02}.{name}.txt": text for i, (name, text) in enumerate(manager.graphs.items())}
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == files


def _double(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(2)


def _data(p: nn.Parameter) -> None:
    p.data = p.data * 2


def _through_numpy(text: Tensor) -> None:
    text.numpy()[:] *= -2


WAYS: dict[str, Callable[[Texted, Tensor], Any]] = {
    "weight in place": lambda m, text: _double(m.keys[0].weight),
    "weight's data": lambda m, text: _data(m.keys[0].weight),
    "weight behind the counter": lambda m, text: m.keys[0].weight.data.mul_(2),
    "bias behind the counter": lambda m, text: m.keys[1].bias.data.mul_(2),
    "new parameter": lambda m, text: setattr(m.keys[0], "weight", nn.Parameter(m.keys[0].weight.detach() * 2)),
    "state dict": lambda m, text: m.load_state_dict({k: v * (1 + ("keys" in k)) for k, v in m.state_dict().items()}),
    "text in place": lambda m, text: text.mul_(-2),
    "text's data": lambda m, text: text.data.mul_(-2),
    "text through numpy": lambda m, text: _through_numpy(text),
}


@pytest.mark.parametrize("way", WAYS)
def test_text_is_projected_anew_when_it_or_its_weights_change(way: str) -> None:
    """At a full step the model as it is now is computed, whatever was kept."""
    model = randomize(Texted())
    opt = optimized(model, Fora(8, 2))
    x, text = noise(), torch.randn(2, 3, 8)
    with torch.no_grad():
        for t in (900, 800):
            opt(x, torch.full((2,), t), text)
        WAYS[way](model, text)
        out = opt(x, torch.full((2,), 700), text)
        torch.testing.assert_close(out, model(x, torch.full((2,), 700), text), rtol=1e-5, atol=1e-6)


def test_hoisting_can_be_switched_off() -> None:
    model, x, text = randomize(Texted()), noise(), torch.randn(2, 3, 8)
    outs = []
    for hoist in (True, False):
        opt = optimized(model, Fora(4, 2), hoist=hoist)
        with torch.no_grad():
            outs.append([opt(x, torch.full((2,), t), text) for t in (900, 800, 700, 600)])
        assert any(s.constant for s in toca_compile.explain(opt).program.segments) is hoist
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
