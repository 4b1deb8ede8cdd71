"""Every transformer class of the installed diffusers, on a short configuration with random weights.

What holds of any model is checked of each: full steps change no bit; at inputs that do not change every kind of step
gives the uncached output; a step that selects all tokens is the uncached step at its own inputs. One trace serves all
policies.
"""

import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import toca_compile
from tests.models import randomize
from tests.versions import newer
from tests.zoo.entries import ENTRIES, Entry
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa, TocaError
from toca_compile.ir.actions import Action, Compute, Selecting, can, legal_actions
from toca_compile.ir.plan import Plan, StepPlan, step_kind
from toca_compile.ir.types import Site, StepKind
from toca_compile.policies import Composition, Every, Partial, Queries, Rule, Selector, Share

transformers = pytest.importorskip("diffusers.models.transformers")

CLASSES = {n: c for n, c in vars(transformers).items() if inspect.isclass(c) and issubclass(c, torch.nn.Module)}
POLICIES: dict[str, Any] = {
    "frr": Fora(3, 3),
    "fpp": ToCa(3, 3, 0.4, schedule="constant", bonus=0.0),
    "frft": TaylorSeer(4, 2, 1),
    "fsfs": BlockCache(4, first=0, interval=2, order=1),
}
FRESH, UPDATE = (Rule(Queries("fresh")),), (Rule(Queries("update")),)  # in turn
QUERIES = Composition(3, Every(3), FRESH, alternate=UPDATE, which=Selector("random"), how_many=Share(0.4))


WAYS: tuple[tuple[Selecting, ...], ...] = (
    (),
    (Partial(), Queries("fresh")),
    (Queries("update"), Queries("fresh"), Partial()),
)


@dataclass(frozen=True)
class AllTokens:
    """After a full step, two on which every site that can is computed by its rows, all of them; the rest in full."""

    num_steps: int = 3
    seen: list[Site] = field(default_factory=list, compare=False)  # the sites of all graphs

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """Sites that can do both ways do one in the second step and the other in the third."""
        self.seen.extend(sites)
        rows = [tuple(_first(site, ways) for site in sites) for ways in WAYS]
        return Plan(tuple(StepPlan(step_kind(row), row) for row in rows), Selector("none"))


def _first(site: Site, ways: Sequence[Selecting]) -> Action:
    """The first way that the site can go; not the one that holds an attention beside an MLP as it was."""
    able = (way for way in ways if can(site, way) and not way.stale(site))
    return next((way.of(site.axis.size, 0) for way in able), Compute())


def test_every_class_has_an_entry() -> None:
    missing = set(CLASSES) - {name.split("/")[0] for name in ENTRIES}
    assert not missing, f"add a config to tests/zoo/entries.py: {', '.join(sorted(missing))}"


def test_the_table_lists_the_entries() -> None:
    assert list(rows()) == sorted(ENTRIES), "EXPECTTEST_ACCEPT=1 writes the table anew"


@pytest.mark.parametrize("name", ENTRIES)
@torch.no_grad()
def test_zoo(name: str) -> None:
    entry, model = ENTRIES[name], build(name)
    if entry.since and not newer(entry.since):
        pytest.skip(f"torch {entry.since} is the first that traces it")
    plain = [outputs(model(**entry.at(step))) for step in range(3)]
    assert all(torch.isfinite(v).all() for v in plain[0])
    assert not torch.equal(plain[0][0], plain[1][0])
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager", strict=not entry.refused)
    check(opt, entry, plain, 0)
    if entry.refused:
        with pytest.raises(TocaError) as raised:
            toca_compile.optimize(model, FullCompute(), lowering="eager")(**entry.at(0))
        reason = re.search(entry.refused, str(raised.value))
        assert reason is not None, raised.value
        keep_row(name, ("–", "–", "–", "–", reason.group()))
        return
    opt.policy = looking = AllTokens()
    sites = looking.seen
    best = [next((a for a in ("partial", "queries") if a in legal_actions(s)), "reuse") for s in sites]
    counts = {a: best.count(a) for a in ("partial", "queries", "reuse") if a in best}
    assert ", ".join(f"{count} {action}" for action, count in counts.items()) == entry.sites
    why = [s.no_queries or s.reason for s, action in zip(sites, best, strict=True) if action == "reuse"]
    keep_row(name, (str(len(sites)), *(str(counts.get(a, "–")) for a in ("partial", "queries")), reused(why), "–"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    follow_policies(opt, entry, plain, sites)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert toca_compile.summary(opt).recompiles == 0


def follow_policies(opt: Any, entry: Entry, plain: Sequence[list[Tensor]], sites: Sequence[Site]) -> None:
    """What the policies give, with the graph that was traced first; all tokens are computed already."""
    check(opt, entry, plain, 1e-5)
    assert kinds(opt) == ("fpp" if any(_first(s, WAYS[1]).kind is StepKind.PARTIAL for s in sites) else "fff")
    for steps, policy in POLICIES.items():
        opt.policy = policy
        check(opt, entry, plain[:1] * len(steps), 1e-5)
        assert kinds(opt) == (steps if steps != "fpp" or any(s.row_proof for s in sites) else "frr")
    if any(s.query_proof for s in sites):
        opt.policy = QUERIES
        check(opt, entry, plain[:1] * 3, 1e-5)
        assert kinds(opt) == "fpp"


def build(name: str) -> Any:
    """The model of an entry, with random weights."""
    kind = CLASSES.get(name.split("/")[0])
    if kind is None:
        pytest.skip("this diffusers has no such class")
    return randomize(kind(**ENTRIES[name].config))


def outputs(out: Any) -> list[Tensor]:
    """The tensors of what a model returns."""
    return [v for v in pytree.tree_leaves(tuple(out.values()) if isinstance(out, dict) else out)]


def check(opt: Any, entry: Entry, plain: Sequence[list[Tensor]], bound: float) -> None:
    """One run, each step with the inputs of its wanted output. ``bound``: of the error, relative; 0: no bit differs."""
    changing = len({id(p) for p in plain}) > 1
    for step, wanted in enumerate(plain):
        for a, b in zip(outputs(opt(**entry.at(step if changing else 0))), wanted, strict=True):
            if bound == 0:
                assert torch.equal(a, b), f"step {step} differs by {(a - b).abs().max()}"
            else:
                torch.testing.assert_close(a, b, rtol=bound, atol=bound * max(1.0, float(b.abs().max())))


def kinds(opt: Any) -> str:
    """The first letters of what the steps of the last run were; ``t`` for forecasts."""
    return "".join({"forecast": "t"}.get(r.kind.value, r.kind.value[0]) for r in opt.steps)


# -- the table ----------------------------------------------------------------------------------------------------------

TABLE = Path(__file__).parent / "COVERAGE.md"
HEAD = """# What is cached in the transformers of diffusers

One short configuration of each class, and those that once found something. *Partial*: sites that compute selected tokens
alone; *queries*: those that do so through an attention; *reuse only*: those that are reused, forecast or skipped whole, and
why. Written by `EXPECTTEST_ACCEPT=1 pytest tests/zoo`, which fails where it has changed.

| class | sites | partial | queries | reuse only | nothing is cached |
| --- | --- | --- | --- | --- | --- |
"""


def rows() -> dict[str, str]:
    """The rows of the table, by entry."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()[len(HEAD.splitlines()) :] if TABLE.exists() else []
    return {line.split(" | ")[0].strip("| "): line for line in lines}


def keep_row(name: str, cells: Sequence[str]) -> None:
    """Hold an entry's row against the table, or write it there."""
    row = f"| {' | '.join((name, *cells))} |"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        known = {n: r for n, r in {**rows(), name: row}.items() if n in ENTRIES}
        TABLE.write_text(HEAD + "".join(f"{known[n]}\n" for n in sorted(known)), encoding="utf-8")
    assert rows().get(name) == row, "EXPECTTEST_ACCEPT=1 writes the table anew"


def reused(why: Sequence[str | None]) -> str:
    """How many sites are only reused, and why the first of them is, without the line, which changes with versions."""
    return f"{len(why)}: {re.sub(r' [(][^()]*:[0-9]+[)]', '', str(why[0]))}" if why else "–"
