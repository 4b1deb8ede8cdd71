"""Artifacts of Inductor are found again by any model of the same blocks, and those not asked for longest are let go."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import FullCompute
from toca_compile.lowerings import artifacts, inductor


class Artifact:
    """What stands for a compiled graph, since compiling takes long."""

    made: "list[weakref.ref[Artifact]]" = []  # noqa: RUF012

    def __init__(self, module: fx.GraphModule, examples: Sequence[Any]) -> None:
        self.module = module
        self.made.append(weakref.ref(self))

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inductor, "_compile", Artifact)
    monkeypatch.setattr(artifacts, "enabled", lambda: False)  # nor read from what another process left
    inductor.clear()
    Artifact.made.clear()
    yield
    inductor.clear()


def run(width: int) -> Any:
    """A new model of some width that has sampled once."""
    opt = toca_compile.optimize(randomize(PlainDiT(width=width, depth=1)), FullCompute())
    sample(opt, 1, noise())
    return opt


def compiled(width: int) -> int:
    """How many graphs such a model compiles."""
    before = inductor.compiles
    run(width)
    return inductor.compiles - before


def test_what_was_not_asked_for_longest_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    a_model = compiled(8)
    assert a_model > 1
    monkeypatch.setattr(inductor, "_KEPT", 2 * a_model)
    assert compiled(16) == a_model
    assert compiled(8) == 0  # asked for again, so it is the younger one now
    assert compiled(24) == a_model  # for which the 16 wide one goes
    assert compiled(16) == a_model
    assert len(inductor._ARTIFACTS) == 2 * a_model


def test_a_model_holds_its_own_and_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_KEPT", 1)
    opt = run(8)
    mine, before = list(Artifact.made), inductor.compiles
    run(16)
    gc.collect()
    assert all(ref() is not None for ref in mine)
    sample(opt, 1, noise())
    assert inductor.compiles == before + len(mine)  # those of the other model
    del opt
    torch._dynamo.reset()
    gc.collect()
    assert not any(ref() is not None for ref in mine)
    assert sum(ref() is not None for ref in Artifact.made) == 1
