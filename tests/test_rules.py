"""Every rule, by its own samples: carried labels commute with restriction, mixed ones have a counterexample."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toca_compile.rules  # noqa: F401
from tests.harness import check
from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, elementwise
from toca_compile.rules.registry import RULES, Rule, register

aten = torch.ops.aten

# Ops whose sample has no meaningful values to compare, with the reason.
VALUELESS = {
    aten.empty.memory_format: "uninitialised memory",
    aten.empty_like.default: "uninitialised memory",
    aten.rand.default: "random values",
    aten.randn.default: "random values",
}


def subset(rng: Random, size: int) -> torch.Tensor:
    k = rng.randint(1, max(1, size - 1))
    return torch.tensor(sorted(rng.sample(range(size), k)))


@pytest.mark.parametrize("op", list(RULES), ids=str)
def test_carried_labels_commute(op: torch._ops.OpOverload) -> None:
    if op in VALUELESS:
        pytest.skip(VALUELESS[op])
    rule = RULES[op]

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10**6), which=st.integers(0, len(rule.samples) - 1))
    def run(seed: int, which: int) -> None:
        rng = Random(seed)
        torch.manual_seed(seed)
        args, kwargs = sample_of(rule, rng, which)
        result = op(*args, **kwargs)
        carried = rule.axes(Call(args, kwargs, result)).carried
        for label, commutes in check(rule, args, kwargs, lambda n: subset(rng, n)).items():
            assert commutes or label not in carried, f"{op} does not carry {label}"

    run()


@pytest.mark.parametrize("op", [o for o in RULES if o not in VALUELESS], ids=str)
def test_mixed_labels_have_a_counterexample(op: torch._ops.OpOverload) -> None:
    """A rule that calls too much mixed would be sound and useless: each claim is shown by one sample at least."""
    rule = RULES[op]
    claimed: set[tuple[int, str]] = set()
    refuted: set[tuple[int, str]] = set()
    for which in range(len(rule.samples)):
        for seed in range(12):
            rng = Random(seed)
            torch.manual_seed(seed)
            args, kwargs = sample_of(rule, rng, which)
            spec = rule.axes(Call(args, kwargs, op(*args, **kwargs)))
            outcome = check(rule, args, kwargs, lambda n, rng=rng: subset(rng, n))
            claimed |= {(which, x) for x in outcome if x in spec.mixed}
            refuted |= {(which, x) for x, commutes in outcome.items() if x in spec.mixed and not commutes}
    assert claimed == refuted


def sample_of(rule: Rule, rng: Random, which: int) -> tuple[tuple[object, ...], dict[str, object]]:
    """A sample call. Ops of one behaviour share samples: arguments beyond those that an op takes are dropped."""
    args, kwargs = rule.samples[which](rng)
    return args[: len([a for a in rule.op._schema.arguments if not a.kwarg_only])], kwargs


def test_a_wrong_rule_is_caught() -> None:
    """Softmax called pointwise: the property must fail on it."""
    wrong = Rule(
        aten.softmax.int,
        lambda call: elementwise(call.operands, call.results),
        (lambda rng: ((torch.randn(3, 4), -1), {}),),
    )
    args, kwargs = wrong.samples[0](Random(0))
    outcome = check(wrong, args, kwargs, lambda n: torch.arange(n - 1))
    spec = wrong.axes(Call(args, kwargs, wrong.op(*args, **kwargs)))
    assert any(not commutes for label, commutes in outcome.items() if label in spec.carried)


def test_duplicate_rules_are_refused() -> None:
    with pytest.raises(RuleError, match=r"add\.Tensor has a rule already"):

        @register(aten.add.Tensor)
        def again(call: Call) -> AxisSpec:
            raise NotImplementedError
