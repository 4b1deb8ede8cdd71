"""Policies from files and from Python: what is no policy is refused with the place and the value, and nothing else
happens; what is one survives being written and read."""

import dataclasses
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import FullCompute, PolicyError, ToCa, load_policy, policies, save_policy
from toca_compile.policies import (
    PRESETS,
    Adaptive,
    Along,
    Anchors,
    Bands,
    BlockCache,
    ByChannel,
    Chebyshev,
    ClusCa,
    Clusters,
    Composition,
    DiCache,
    Dmd,
    DuCa,
    EasyCache,
    EndAligned,
    Every,
    FilteredInput,
    FirstBlocks,
    FirstInput,
    FirstOutput,
    Foca,
    Fora,
    Forecast,
    FreqCa,
    Given,
    Hermite,
    IntervalFunction,
    LastBlocks,
    Level,
    Listed,
    MagCache,
    Magnitudes,
    MeanCache,
    MeanVelocity,
    Mixed,
    Partial,
    Periodic,
    Planned,
    Polynomial,
    Queries,
    Rate,
    Reuse,
    Rule,
    SeaCache,
    Selector,
    Share,
    SkipBlocks,
    SpeCa,
    Spread,
    Taylor,
    TaylorSeer,
    TaylorToCa,
    TeaCache,
    preset,
    ready_made,
)
from toca_compile.policies.schedules import RatioSchedule


def rule(do: Any, **fields: Any) -> dict[str, Any]:
    return {
        "policy": "Composition",
        "rules": [{"part": "Rule", "do": {"part": "Reuse"}}, {"part": "Rule", "do": do, **fields}],
    }


def reuse(**fields: Any) -> dict[str, Any]:
    return rule({"part": "Reuse"}, **fields)


def composition(**fields: Any) -> dict[str, Any]:
    return {"policy": "Composition", **fields}


def toca(**fields: Any) -> dict[str, Any]:
    return {"policy": "ToCa", **fields}


def ratios(**fields: Any) -> dict[str, Any]:
    return toca(ratios={"part": "RatioSchedule", **fields})


# What a file holds, as text, bytes or data, and what the error has to say of it: the place and, mostly, the value.
WRONG: list[tuple[Any, str]] = [
    # No policy at all.
    ("", "line 1"), ("{", "line 1"), ("[]", r"not \[\]"), ("3", "not 3"), ("null", "not None"), ('"ToCa"', "not 'ToCa'"),
    ("{}", "'policy' is one of FullCompute"), ({"policy": "Other"}, "not 'Other'"), ({"policy": ["ToCa"]}, r"not \['ToCa'\]"),
    ({"policy": None}, "not None"), ({"part": "Rule", "do": {"part": "Reuse"}}, "'policy' is one of"), ({"policy": "Rule"}, "not 'Rule'"),
    (b"\xff\xfe{", "utf-8"), ("[" * 100_000, "nests too deeply"), ('{"policy": "ToCa", "x": ' + "[" * 100_000, "nests too deeply"),
    (b" " * (5 << 20), "larger than 4 MiB"), ('{"policy": "Fora", "interval": ' + "9" * 5000 + "}", "digits"),
    # Fields that are not there, there twice, or not filled in.
    (toca(pace=3), "no field 'pace'"), ('{"policy": "ToCa", "interval": 3, "interval": 4}', "'interval' stands twice"),
    ('{"policy": "ToCa", "periods": {"mlp": 3, "mlp": 4}, "schedule": "periodic"}', "periods: 'mlp' stands twice"),
    ('{"policy": "Composition", "when": {"part": "Every", "part": "Spread"}}', "when: 'part' stands twice"),
    (rule({"part": "Forecast", "colour": 1}), r"rules\[1\]\.do: Forecast has no field 'colour'; it has order"),
    (composition(rules=[{"part": "Rule"}]), r"rules\[0\]\.do is missing"), (composition(when={"part": "Listed"}), r"when\.full is missing"),
    # Whole numbers.
    (toca(num_steps=0), "num_steps .* from 1 to 10000, not 0"), (toca(num_steps=10**12), "num_steps .* not 1000000000000"),
    (toca(num_steps=2.0), r"num_steps .* not 2\.0"), (toca(num_steps=True), "num_steps .* not True"), (toca(num_steps="50"), "num_steps .* not '50'"),
    (toca(num_steps=None), "num_steps .* not None"), (toca(interval=math.nan), "interval .* not nan"), (toca(cell=-1), "cell .* not -1"),
    (toca(seed=1.5), r"seed .* not 1\.5"), (toca(seed=2**70), "seed .* from 0 to 2147483647"), (toca(layer_span=-3), "layer_span .* or None, not -3"),
    (toca(score_stride=0), "score_stride .* not 0"), (composition(which={"part": "Selector", "stride": 0}), r"which\.stride .* not 0"),
    (rule({"part": "Forecast", "order": 2.0}), r"rules\[1\]\.do\.order must be a whole number from 0 to 4, not 2\.0"),
    (rule({"part": "Queries", "refresh": -1}), r"rules\[1\]\.do\.refresh .* not -1"), (rule({"part": "SkipBlocks", "first": -1}), r"do\.first .* not -1"),
    (composition(how_many={"part": "Share", "span": -4}), r"how_many\.span .* not -4"), (composition(differences_from=0), "differences_from .* not 0"),
    ({"policy": "BlockCache", "limit": [], "threshold": 0.1}, r"limit .* not \[\]"),
    # Numbers.
    (toca(fresh_ratio=7), "fresh_ratio .* not 7; .* complement"), (toca(fresh_ratio=math.nan), "fresh_ratio .* not nan"),
    (composition(how_many={"part": "Share", "ratio": math.nan}), r"how_many\.ratio .* not nan"), (toca(bonus=math.inf), "bonus .* not inf"),
    (toca(interval_slope=1), "interval_slope .* below 1, not 1"), ({"policy": "BlockCache", "bend": True}, "bend .* not True"),
    ({"policy": "BlockCache", "threshold": -0.1}, r"threshold .* not -0\.1"), (toca(staleness_weight=-math.inf), "staleness_weight .* not -inf"),
    (composition(when={"part": "Spread", "bend": "1"}), r"when\.bend .* not '1'"), (ratios(layer=[1, math.nan]), r"ratios\.layer\[1\] .* not nan"),
    (composition(when={"part": "Adaptive", "threshold": 0}), r"when\.threshold .* above 0"),
    # Names and switches.
    (toca(schedule="cosine"), "schedule must be one of toca, .* not 'cosine'"), (toca(count=["up"]), r"count .* not \['up'\]"),
    ({"policy": "TaylorToCa", "update": "no"}, "update must be True or False, not 'no'"), (toca(shared_pair=1), "shared_pair .* not 1"),
    ({"policy": "TaylorToCa", "keys": "stale"}, "keys must be one of fresh, update, keep or None"), (composition(basis=2), "basis .* not 2"),
    *(({"policy": "TaylorSeer", "cache_dtype": name}, f"cache_dtype .* floating-point .* not '?{name}")
      for name in ("int8", "float8_e8m0fnu", "float4_e2m1fn_x2", "complex64", "Tensor", "no", 16)),
    # Lists and mappings.
    (toca(sensitive=[0.1]), r"sensitive .* of 2, .* not \[0\.1\]"), (toca(sensitive=0.1), r"sensitive .* not 0\.1"), (toca(sensitive=[0.4, 0.2]), "sensitive .* range"),
    (toca(sensitive={}), "sensitive .* not {}"), (ratios(layer=[1, 2, 3]), r"ratios\.layer .* of 2, .* not \[1, 2, 3\]"), (ratios(step="ab"), r"ratios\.step .* not 'ab'"),
    (reuse(kinds="mlp"), r"rules\[1\]\.kinds .* list, .* not 'mlp'"), (reuse(kinds=["mlps"]), r"rules\[1\]\.kinds\[0\] must be one of self_attention, .* not 'mlps'"),
    (reuse(depths=[0.8, 0.2]), r"rules\[1\]: depths .* range"), (reuse(depths=[-1, 2]), r"rules\[1\]\.depths\[0\] .* not -1"), (reuse(kinds=[["mlp"]]), r"kinds\[0\] .* not \['mlp'\]"),
    (ratios(kinds={"keys": 1.0}), r"a key of ratios\.kinds .* not 'keys'"), (ratios(kinds={"mlp": None}), r"ratios\.kinds\['mlp'\] .* not None"),
    (ratios(kinds=["mlp"]), r"ratios\.kinds .* mapping .* not \['mlp'\]"), (toca(periods={"mlp": 0}, schedule="periodic"), r"periods\['mlp'\] .* not 0"),
    ({"policy": "TaylorSeer", "full": [0, 1.0]}, r"full\[1\] .* not 1\.0"), ({"policy": "TaylorSeer", "full": [1, 2]}, "full must rise from 0"),
    ({"policy": "TaylorSeer", "full": "01"}, "full .* not '01'"), (composition(when={"part": "Listed", "full": []}), "when: full must rise from 0"),
    (composition(num_steps=5, when={"part": "Listed", "full": [0, 7]}), "full must stay below num_steps = 5"),
    # Parts.
    (composition(rules={}), "rules .* not {}"), (composition(rules=3), "rules .* not 3"), (composition(rules=[3]), r"rules\[0\] .* 'part' is one of Rule, not 3"),
    (composition(how_many=0.3), r"how_many .* 'part' is one of Share, not 0\.3"), (composition(when=None), "when .* Every, .* not None"),
    (composition(when={"part": "Share"}), "when .* Every, .* not 'Share'"), (composition(when={"interval": 3}), "when .* 'part' is one of"),
    (rule({"part": "Every"}), r"rules\[1\]\.do .* Compute, .* not 'Every'"), (rule({"part": ["Reuse"]}), r"rules\[1\]\.do .* not \['Reuse'\]"),
    (composition(which={"part": "Clusters", "clusters": 1}), r"which\.clusters .* from 2 to 4096, not 1"), ({"policy": "ClusCa", "gamma": 2}, "gamma .* not 2"),
    (rule({"part": "Queries", "refresh": 2}), r"rules\[1\]\.do: keys that are fresh"), (toca(ratios={}), "ratios .* 'part' is one of RatioSchedule, not {}"),
    (toca(ratios=[1.0]), r"ratios .* not \[1\.0\]"), (composition(which={"part": "Selector", "score": "loud"}), r"which\.score .* not 'loud'"),
    (toca(periods={"mlp": 3}), "periods need schedule='periodic'"),
]  # fmt: skip


@pytest.mark.parametrize(("held", "why"), WRONG, ids=range(len(WRONG)))
def test_a_file_that_is_no_policy_says_where_and_why(held: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if isinstance(held, bytes):
        path.write_bytes(held)
    else:
        path.write_text(held if isinstance(held, str) else json.dumps(held))
    with pytest.raises(PolicyError, match=why) as error:
        load_policy(path)
    assert str(error.value).startswith(f"{path} holds no policy: ")
    assert len(str(error.value)) < 700  # it shows the value, not all of it


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PolicyError, match=rf"{path.name} cannot be read"):
            load_policy(path)


PARTS = [
    FullCompute(), Fora(), ToCa(), DuCa(), TaylorSeer(), TaylorToCa(), BlockCache(), Composition(), RatioSchedule(), Selector(), Share(),
    Rule(Reuse()), Reuse(), Forecast(), Partial(), Queries(), SkipBlocks(), Every(), Periodic(), IntervalFunction(), Spread(),
    Listed((0,)), EndAligned(), Adaptive(), Level(), ClusCa(), Clusters(), Anchors(Polynomial()), Polynomial(), Taylor(), Hermite(), Foca(), Chebyshev(), Dmd(),
    Mixed((Foca(),), ((1.0,),)), Given(((1.0,),)), TeaCache(), SeaCache(), MagCache(), FirstBlocks(), FirstInput(), FilteredInput(), Magnitudes(), Planned(4, (0, 2), Foca()),
    EasyCache(), DiCache(), SpeCa(), Rate(), FirstOutput(), LastBlocks(), Along(), FreqCa(), Bands(), ByChannel(), MeanCache(), MeanVelocity(),
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda p: type(p).__name__)
def test_no_field_takes_just_anything(part: Any) -> None:
    """Each says in its type what it may be, so that nothing is refused only when a run is under way."""
    names = {name for name in policies.__all__ if isinstance(getattr(policies, name), type)}
    assert names <= {type(p).__name__ for p in PARTS} | {"Compute"}
    for field in dataclasses.fields(part):
        for value in (object(), math.nan, [object()], {"part": 1}):
            if field.name == "found" and isinstance(value, dict):
                continue  # a number by name is what it holds
            with pytest.raises(PolicyError, match=field.name):
                replace(part, **{field.name: value})


@pytest.mark.parametrize(
    ("make", "why"),
    [(lambda: ToCa(num_steps=True), "num_steps .* not True"), (lambda: ToCa(num_steps=10_001), "from 1 to 10000"), (lambda: Forecast(2.0), "order .* not 2.0"),
     (lambda: Rule(Forecast), "do .* one of Compute, .* not <class"), (lambda: Composition(rules=Rule(Reuse())), "rules .* not Rule"), (lambda: Rule(Reuse(), "mlp"), "kinds"),
     (lambda: Composition(when=Share()), "when .* Every.* not Share"), (lambda: Composition(which="error"), "which must be one of Selector, Clusters, not 'error'"),
     (lambda: Share(np.float32("nan")), "ratio .*nan"), (lambda: ToCa(shared_pair=np.True_), "shared_pair"), (lambda: ToCa(ratios={"layer": (1, 2)}), "ratios"),
     (lambda: Listed(range(3)), "full"), (lambda: ToCa(interval=np.int64(0)), "interval"), (lambda: ToCa(10**5000), "num_steps .* a value of type int")],
)  # fmt: skip
def test_python_is_read_as_strictly(make: Any, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make()


def test_numbers_of_numpy_and_lists_are_taken_as_pythons_own(tmp_path: Path) -> None:
    periods: dict[str, Any] = {"mlp": np.int32(2)}
    given = ToCa(
        np.int64(30),
        fresh_ratio=np.float32(0.5),
        sensitive=[0, np.float64(0.3)],
        bonus=1,
        schedule="periodic",
        periods=periods,
    )
    assert given == ToCa(30, fresh_ratio=0.5, sensitive=(0.0, 0.3), bonus=1.0, schedule="periodic", periods={"mlp": 2})
    assert [type(v) for v in (given.num_steps, given.fresh_ratio, given.bonus, given.periods["mlp"])] == [
        int,
        float,
        float,
        int,
    ]
    periods["mlp"] = 0
    assert given.periods == {"mlp": 2}  # what was checked stays as it was
    assert hash(Rule(Reuse(), kinds=["mlp"])) == hash(Rule(Reuse(), kinds=("mlp",)))
    save_policy(given, tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == given


def test_a_policy_of_the_users_own_may_have_fields_of_its_own() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(ToCa):
        note: str = ""
        way: Literal["a", "b"] = "a"
        found: Annotated[list[int], "of its own"] = dataclasses.field(default_factory=list)
        more: dict[str, int] | list[int] | None = None
        table: "NotToBeFound" = None  # type: ignore[name-defined]  # noqa: F821

    assert Mine(note="mine", found=[1], more={"x": 1}) != Mine(note="mine", found=[1], more=[1])
    with pytest.raises(PolicyError, match="cell"):
        Mine(cell=0)


@pytest.mark.parametrize("policy", [*ready_made(20).values(), *map(preset, PRESETS)], ids=lambda p: type(p).__name__)
def test_every_ready_made_policy_and_preset_survives_a_file(policy: Any, tmp_path: Path) -> None:
    for kept in (policy, policy.composition()):
        save_policy(kept, tmp_path / "policy.json")
        assert load_policy(tmp_path / "policy.json") == kept


class NoMethod:
    plan = 3


@pytest.mark.parametrize(
    ("given_policy", "why"),
    [(None, "not None"), ("x", r"preset\(name\)"), (ToCa, r"write ToCa\(\.\.\.\)"), ({"policy": ToCa()}, "pass the policy itself"), (NoMethod(), "no method"),
     (NoMethod, r"write NoMethod\(\.\.\.\)"), (3, "not 3"), (len, "built-in")],
)  # fmt: skip
def test_what_is_no_policy_is_told_what_to_write(given_policy: Any, why: str) -> None:
    model = PlainDiT(depth=1)
    with pytest.raises(PolicyError, match=rf"caching policy such as toca_compile\.ToCa.*{why}"):
        toca_compile.optimize(model, given_policy)
    opt = toca_compile.optimize(model, Fora(4, 2))
    with pytest.raises(PolicyError, match=why):
        opt.policy = given_policy
    assert opt.policy == Fora(4, 2)


# -- any change of a policy's file ------------------------------------------------------------------------------------

BASES = [
    ToCa(6, 2, 0.3), DuCa(6, 3), Fora(5), FullCompute(), TaylorSeer(6, full=(0, 2)), TaylorToCa(6, 3, keys="update"), BlockCache(6, 1, threshold=0.1, limit=2),
    preset("opensora-1.2/rflow-30", num_steps=8), preset("pixart-alpha/dpm-20", num_steps=7).composition(), DuCa(6).composition(),
    ClusCa(6, 3, 4), Composition(6, Every(3), (Rule(Partial()),), which=Clusters(4)),
    Composition(6, Spread(2, 0.8), (Rule(Queries("keep", 2), ("mlp",), (0.0, 0.5)), Rule(Partial(1)), Rule(Forecast(2)))),
]  # fmt: skip
JUNK: list[Any] = [
    None, True, False, "", "no", "mlp", "fresh", "ToCa", 0, -1, 1, 2, 3, 2.0, 0.3, -0.5, math.nan, math.inf, -math.inf, 10**12, 10**400, [], {}, [1, 2, 3], ["mlp"],
    [0.8, 0.2], {"part": "Share"}, {"part": "Rule"}, {"part": "Every", "interval": 2}, {"mlp": 2}, [[[]]], {"part": {}}, "bfloat16", "float8_e8m0fnu",
]  # fmt: skip


class Pairs(list[Any]):
    """A JSON object that may have a key twice."""


def tree(data: Any) -> Any:
    if isinstance(data, dict):
        return Pairs((k, tree(v)) for k, v in data.items())
    return [tree(v) for v in data] if isinstance(data, list) else data


def text(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {text(v)}" for k, v in value) + "}"
    return "[" + ", ".join(map(text, value)) + "]" if isinstance(value, list) else json.dumps(value)


def places(value: Any) -> list[tuple[list[Any], int]]:
    """Every value of a file, as the list that holds it and its number there."""
    found: list[tuple[list[Any], int]] = []
    for i, item in enumerate(value if isinstance(value, list) else ()):
        found += [(value, i), *places(item[1] if isinstance(value, Pairs) else item)]
    return found


def parts_of(value: Any) -> list[Any]:
    here = [dict(value)] if isinstance(value, dict) and "part" in value else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return here + [part for v in inner for part in parts_of(v)]


@cache
def base_data(path: Path) -> list[Any]:
    """What is written of the policies to change."""
    found = []
    for policy in BASES:
        save_policy(policy, path)
        found.append(json.loads(path.read_text()))
    return found


@cache
def compiled() -> Any:
    """A model with a policy that tells what sites it sees."""
    opt = toca_compile.optimize(randomize(PlainDiT((8, 8), 8, 2, 2)), Fora(2, 2), lowering="eager")
    sample(opt, 2, noise(1))
    return opt


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_change_is_refused_or_makes_a_policy_that_can_be_planned(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.json"
    bases = base_data(path)
    file = tree([data.draw(st.sampled_from(bases))])
    others = [part for base in bases for part in parts_of(base)]
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = places(file)
        if not at:
            break
        holder, i = data.draw(st.sampled_from(at))
        old = holder[i][1] if isinstance(holder, Pairs) else holder[i]
        new = tree(data.draw(st.sampled_from([*JUNK, *others])))
        how = data.draw(st.sampled_from(["replace", "drop", "drop", "add", "twice", "nest", "rename"]))
        key = data.draw(st.sampled_from(["part", "policy", "order", "interval", "x", "", "keys"]))
        if how == "drop":
            del holder[i]
        elif how == "twice":
            holder.append(holder[i])
        elif how == "add":
            holder.append((key, new) if isinstance(holder, Pairs) else new)
        elif how == "rename" and isinstance(holder, Pairs):
            holder[i] = (key, old)
        else:
            value = new if how == "replace" else [old] if data.draw(st.booleans()) else Pairs([("part", old)])
            holder[i] = (holder[i][0], value) if isinstance(holder, Pairs) else value
    path.write_text(text(file[0]) if file else "")
    try:
        policy = load_policy(path)
    except PolicyError:
        return
    save_policy(policy, path)
    assert load_policy(path) == policy
    try:
        compiled().policy = policy  # plans for the model's sites
    except PolicyError:
        return
    assert toca_compile.explain(compiled()).schedule
