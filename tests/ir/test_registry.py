"""To add a policy, a schedule or a lowering is to add one file."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import Composition, Fora, PolicyError, TocaError, load_policy, lowerings, policies, save_policy
from toca_compile.ir.fields import Checked
from toca_compile.ir.registry import register
from toca_compile.lowerings.registry import lowering
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.when import When

POLICY = """
from dataclasses import dataclass
from toca_compile.ir.fields import Count
from toca_compile.policies import register
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition
from toca_compile.policies.when import When

@register
@dataclass(frozen=True)
class Halving(When):
    '''Full at 0 and where what is left has halved.'''
    least: Count = 1

    def phases(self, num_steps, kind):
        return tuple(0 if call in {num_steps - (num_steps >> i) for i in range(9)} else 1 for call in range(num_steps))

@register
@dataclass(frozen=True)
class Mine(Composed):
    least: Count = 1

    def parts(self):
        return Composition(self.num_steps, Halving(self.least))
"""
LOWERING = """
from toca_compile.lowerings.registry import lowering

@lowering("mine", dense={dense})
def lower(variant, examples):
    seen.append(variant.module)
    return variant.module.forward

seen = []
"""


def added(package: Any, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a file that lies beside those of a package when that is imported."""
    name = f"{package.__name__}.mine"
    (folder / "mine.py").write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    path = Path(package.__file__)
    monkeypatch.delitem(sys.modules, name, raising=False)
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": package.__name__, "__path__": package.__path__})
    return sys.modules[name]


@pytest.fixture
def own_tables() -> Iterator[None]:
    """What a test registers is gone after it."""
    tables: list[dict[str, Any]] = [CachingPolicy.members, When.members, lowerings.LOWERINGS]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.mark.usefixtures("own_tables")
def test_a_policy_and_a_schedule_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = added(policies, POLICY, tmp_path, monkeypatch)
    for policy in (mine.Mine(16, 2), mine.Mine(16, 2).composition(), Composition(16, mine.Halving(3))):
        save_policy(policy, tmp_path / "policy.json")
        assert load_policy(tmp_path / "policy.json") == policy
    (tmp_path / "policy.json").write_text('{"policy": "Mine", "least": 0}')
    with pytest.raises(PolicyError, match=r"least .* not 0"):
        load_policy(tmp_path / "policy.json")
    with pytest.raises(PolicyError, match=r"when must be one of Every, .*, Halving, not 3"):
        Composition(when=3)
    opt = toca_compile.optimize(randomize(PlainDiT(depth=1)), mine.Mine(16), lowering="eager")
    sample(opt, 16, noise())
    assert toca_compile.explain(opt).schedule == "FRRRRRRRFRRRFRFF"


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("dense", [False, True])
def test_a_lowering_is_one_file(dense: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given what it asks for: the rows that are selected, or all of them."""
    mine = added(lowerings, LOWERING.format(dense=dense), tmp_path, monkeypatch)
    model = randomize(PlainDiT(depth=1))
    policy = toca_compile.ToCa(2, fresh_ratio=0.3, schedule="constant")
    outs = [sample(toca_compile.optimize(model, policy, lowering=way), 2, noise()) for way in ("eager", "mine")]
    torch.testing.assert_close(*outs)
    gathers = [n for m in mine.seen for n in m.graph.nodes if "gather_tokens" in str(n.target)]
    assert mine.seen
    assert bool(gathers) is not dense


@pytest.mark.usefixtures("own_tables")
def test_names_are_given_once() -> None:
    class Every(When):
        pass

    with pytest.raises(TocaError, match=r"registers a Every, and toca_compile\.policies\.when has one"):
        register(Every)
    assert register(policies.Every) is policies.Every  # the same class again is no other
    with pytest.raises(TocaError, match="'eager' already"):
        lowering("eager")(lambda variant, examples: variant.module.forward)
    with pytest.raises(TocaError, match="choose one of dense, eager, inductor"):
        toca_compile.optimize(PlainDiT(depth=1), Fora(2, 2), lowering="none")


def test_what_has_not_registered_cannot_be_saved(tmp_path: Path) -> None:
    class Mine(Fora):
        pass

    with pytest.raises(PolicyError, match=r"Mine cannot be saved.*toca_compile\.policies\.register"):
        save_policy(Mine(3, 2), tmp_path / "policy.json")


def test_tables_are_apart() -> None:
    """A schedule is no policy, and what both are made of has no table."""
    assert set(CachingPolicy.members).isdisjoint(When.members)
    assert not hasattr(Checked, "members")
