"""Random models, each under random policies; and that the fuzzer sees what it is there to see.

Of two hundred models, tracing which is nearly all that a test costs, as many are traced as have every feature between
them (``features``: each value of each field, each op of the table); all two hundred policies are followed, some by each.
``TOCA_FUZZ=all`` traces each of the two hundred, under a policy of its own.
"""

import argparse
import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzz import campaign
from tests.fuzz.grammar import Attention, Block, Branch, Spec, covering, draw, draw_policy, features, read, written
from tests.fuzz.minimise import minimise
from tests.fuzz.mixes import TABLE
from tests.fuzz.models import build, inputs
from tests.fuzz.oracles import Tally, examine
from toca_compile import Fora, FullCompute, TaylorSeer, ToCa
from toca_compile.lowerings import LOWERINGS
from toca_compile.policies import Composition, Every, Queries, Rule, Selector, Share
from toca_compile.rules.pointwise import elementwise_axes
from toca_compile.rules.registry import RULES

MODELS, CHUNK = 200, 4
SEEDS = list(range(MODELS)) if os.environ.get("TOCA_FUZZ") == "all" else covering(range(MODELS))
aten = torch.ops.aten


@pytest.mark.parametrize("first", range(0, len(SEEDS), CHUNK))
def test_random_models(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setenv("TOCA_VERIFY", "1")  # as users have it
    found = []
    for i, seed in list(enumerate(SEEDS))[first : first + CHUNK]:
        left_out = [s for s in range(MODELS) if s not in SEEDS]
        policies = [draw_policy(random.Random(s)) for s in (seed, *left_out[i :: len(SEEDS)])]
        found += [f"seed {seed}: {f}" for f in examine(draw(seed), policies)]
    assert not found, "\n".join(found)


def test_the_models_have_every_feature() -> None:
    drawn, all_drawn = ({f for seed in seeds for f in features(draw(seed))} for seeds in (SEEDS, range(MODELS)))
    assert drawn == all_drawn


def test_descriptions_are_told_and_read() -> None:
    for seed in range(100):
        spec, policy = draw(seed), draw_policy(random.Random(seed))
        assert read(written(spec)) == spec
        assert read(written(policy)) == policy


def test_every_branch_matters() -> None:
    """A branch that is left out moves the output of a drawn model: else no oracle would see what becomes of it."""
    for seed in range(40):
        spec = draw(seed)
        if spec.shared_weights or any(b.style in ("joint", "encoder") for b in spec.blocks):
            continue
        model: Any = build(spec)
        given = inputs(spec, 1, True)[0]
        with torch.no_grad():
            whole = model(*given)
            for stage in model.blocks:
                for branch in stage.branches if stage.spec.style != "sum" else ():
                    branch.keep = lambda path, value, lay: torch.zeros_like(value)
                    assert not torch.allclose(model(*given), whole, rtol=1e-3, atol=1e-3), (seed, branch.path)
                    branch.keep = lambda path, value, lay: value


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("island", ["autocast", "bfloat16"])
def test_every_op_runs_in_every_precision(island: str, dtype: str) -> None:
    """A model that fails without the compiler tells nothing of it: no draw may be one."""
    for name in TABLE:
        for body in ("mlp", "attention"):
            spec = Spec((Block((Branch(body, inside=name, island=island),)),), dtype=dtype)
            with torch.no_grad():
                assert build(spec)(*inputs(spec, 1, True)[0]).isfinite().all(), (name, body)


def test_a_campaign_counts_the_models_that_do_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken, sound = with_op("silu"), SPEC
    monkeypatch.setattr(campaign, "draw", lambda seed: (broken, sound)[seed])
    monkeypatch.setattr(campaign, "draw_policy", lambda r: Fora(2, 2))
    monkeypatch.setitem(TABLE, "silu", ((), lambda m, h: h @ h))
    monkeypatch.setenv("TOCA_VERIFY", "0")  # the campaign sets it
    given = argparse.Namespace(
        verify=False, minutes=1.0, seed=0, models=2, jobs=1, without="", policies=1, minimise=0.0, each=1, out=tmp_path
    )
    tally = campaign.work(given, 0)
    assert (tally.unusable, tally.models, tally.failures.total()) == (1, 1, 0)
    assert "seed 0: unusable: RuntimeError" in capsys.readouterr().out


# -- faults that it must see -------------------------------------------------------------------------------------------

SPEC = Spec((Block((Branch("attention", modulation="block", gate="block"), Branch(modulation="block", gate="block"))),))
SOME = ToCa(6, 3, 0.4, "constant", "random")
ROWS = Composition(
    6, Every(3), (Rule(Queries(), kinds=("self_attention",)),), which=Selector("random"), how_many=Share(0.4)
)  # fmt: skip


def with_op(name: str) -> Spec:
    """A model whose MLP has that op on its hidden units."""
    attention, mlp = SPEC.blocks[0].branches
    return dataclasses.replace(SPEC, blocks=(Block((attention, dataclasses.replace(mlp, inside=name))),))


@pytest.mark.parametrize(
    ("op", "name"),
    [(aten.roll.default, "roll"), (aten.flip.default, "flip"), (aten.cumsum.default, "cumsum"), (aten.softmax.int, "softmax")],
)  # fmt: skip
def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch, op: Any, name: str) -> None:
    """An op across tokens that its rule calls token by token."""
    monkeypatch.setenv("TOCA_VERIFY", "0")  # the oracles are to see it, not the compiler's own check
    spec = with_op(name)
    assert not examine(spec, [SOME])
    assert op in RULES
    monkeypatch.setitem(RULES, op, dataclasses.replace(RULES[op], axes=elementwise_axes))
    found = examine(spec, [SOME])
    assert found
    assert {f.kind for f in found} <= {"constant", "blend"}


class Faulty(torch.fx.Interpreter):
    """Runs a variant with one of its ops done wrong."""

    fault: str = ""
    calls: int = 0

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value, or a wrong one."""
        toca = torch.ops.toca
        if n.target is toca.scatter_tokens_.default and self.fault == "scatter":
            cache, index, *rest = self.fetch_args_kwargs_from_env(n)[0]
            return toca.scatter_tokens_((cache), (index + 1) % cache.shape[1], *rest)
        if n.target is toca.gather_tokens.default and self.fault == "gather":
            x, index, *rest = self.fetch_args_kwargs_from_env(n)[0]
            return toca.gather_tokens(x, index.flip(1), *rest)
        if n.target is toca.store_.default and self.fault in ("store", "second store"):
            type(self).calls += 1
            cache, value = self.fetch_args_kwargs_from_env(n)[0]
            early = self.fault == "second store" and type(self).calls <= 4
            return toca.store_(cache, value) if early else cache
        if n.target is toca.forecast.default and self.fault == "forecast":
            cache, slope, power, order = self.fetch_args_kwargs_from_env(n)[0]
            return toca.forecast(cache, slope, power + 1, order)
        if n.target is toca.mark_fresh_.default and self.fault == "mark":
            return self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)


@pytest.mark.parametrize(
    ("fault", "policy", "kind"),
    [("scatter", SOME, "constant"), ("scatter", ROWS, "constant"), ("gather", SOME, "constant"), ("store", SOME, "constant"),
     ("second store", Fora(6, 3), "blend"), ("mark", SOME, "counts"), ("mark", ROWS, "counts"), ("forecast", TaylorSeer(7, 3, 1), "blend")],
)  # fmt: skip
def test_a_wrong_emission_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str, policy: Any, kind: str) -> None:
    monkeypatch.setenv("TOCA_VERIFY", "0")
    monkeypatch.setattr(Faulty, "calls", 0)
    monkeypatch.setitem(LOWERINGS, "faulty", lambda variant, examples: Faulty(variant.module).run)
    monkeypatch.setattr(Faulty, "fault", fault)
    assert kind in {f.kind for f in examine(SPEC, [policy], lowering="faulty")}


def test_nothing_is_seen_of_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOCA_VERIFY", "0")
    monkeypatch.setitem(LOWERINGS, "faulty", lambda variant, examples: Faulty(variant.module).run)
    for policy in (SOME, ROWS, Fora(6, 3), TaylorSeer(7, 3, 1)):
        assert not examine(SPEC, [policy], lowering="faulty")


def test_oracles_are_applied() -> None:
    tally = Tally()
    examine(SPEC, [SOME, ROWS, Fora(6, 3), TaylorSeer(6, 3, 1)], tally)
    assert tally.failures.total() == 0
    assert tally.applied["bits"] == 1
    assert tally.applied["constant"] == 4
    assert tally.applied["blend"] == 3
    assert tally.applied["blend with forecasts"] == 1


def test_a_failure_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with much else, the op whose rule is wrong is left."""
    monkeypatch.setenv("TOCA_VERIFY", "0")
    monkeypatch.setitem(RULES, aten.roll.default, dataclasses.replace(RULES[aten.roll.default], axes=elementwise_axes))
    spec = Spec((Block((Branch("attention", Attention(rope="halves")), Branch(gate="token", inside="roll"))),))
    (failure,) = examine(spec, [dataclasses.replace(SOME, num_steps=4)])
    small, failure = minimise(spec, failure)
    assert "roll" in written(small)
    assert "rope" not in written(small)
    assert "gate" not in written(small)
    assert examine(small, [FullCompute()]) == []
