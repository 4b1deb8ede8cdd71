"""Hoist: what does not change during a run is computed once, and anew when what it is made from changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import Texted, randomize
from tests.programs import reading_program
from tests.runs import optimized
from tests.sampling import noise
from toca_compile import Fora
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.ir.program import Program

aten = torch.ops.aten


def test_keys_and_values_of_the_text_stand_first(program: Program) -> None:
    first, *others = reading_program().segments
    assert first.constant
    assert aten.linear.default in [n.target for n in first.nodes]
    assert not any(s.constant for s in others)
    assert not any(s.constant for s in program.segments)  # nothing is read but the picture


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
