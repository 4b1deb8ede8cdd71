"""Calls without Dynamo: a step that takes the most from caches looks up the inputs that it reads, and nothing else."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from tests.compiler.test_wrappers import quantised
from tests.models import PlainDiT, randomize
from tests.runs import POLICY, TIMES, kinds, optimized, steps
from tests.sampling import noise
from toca_compile import BlockCache, Fora, explain, traced
from toca_compile.backend import guards_hold
from toca_compile.direct import Direct
from toca_compile.traced import Caller

SCOPE = {"self": [torch.ones(1), torch.zeros(1)], "args": (torch.ones(2),)}
NAMES = ("L['self'][0]", "L['args'][0]", "L['self'][1]")
INPUTS = (SCOPE["self"][0], SCOPE["args"][0], SCOPE["self"][1])
MADE = (torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: a,
        lambda a, b: (b,),
        lambda a, b: [a, {"other": b, "scale": 3.0, "name": "x"}, None],
        lambda a, b: Transformer2DModelOutput(sample=a),
        lambda a, b: OrderedDict(b=b, a=a),
    ],
)
def test_results_are_handed_out_in_the_form_that_they_had(form: Any) -> None:
    direct = Direct.of(NAMES, SCOPE, INPUTS, MADE, form(*MADE))
    assert direct is not None
    others = tuple(torch.randn(3) for _ in MADE)
    found, meant = direct.result(others), form(*others)
    assert type(found) is type(meant)
    assert str(found) == str(meant)


@pytest.mark.parametrize("out", [MADE[0] + 1, (MADE[0], object()), INPUTS[0]])
def test_what_the_graph_did_not_make_cannot_be_handed_out(out: Any) -> None:
    assert Direct.of(NAMES, SCOPE, INPUTS, MADE, out) is None


def test_results_that_are_one_cannot_be_told_apart() -> None:
    assert Direct.of(NAMES, SCOPE, INPUTS, (MADE[0], MADE[0]), MADE[0]) is None


@pytest.mark.parametrize("name", ["L['self'][1]", "L['nobody']", "___dynamo_alone(L['self'])", "L['self'"])
def test_inputs_that_are_not_found_by_their_names(name: str) -> None:
    assert Direct.of((name, *NAMES[1:]), SCOPE, INPUTS, MADE, MADE[0]) is None


def test_only_inputs_that_are_read_are_looked_up_and_the_models_own_are_those_that_they_were() -> None:
    model = [torch.ones(1), torch.zeros(1)]
    scope = {"self": model, "args": (torch.ones(2),)}
    inputs = (model[0], scope["args"][0], model[1])
    direct = Direct.of(NAMES, scope, inputs, MADE, MADE[0])
    assert direct is not None
    direct.guarded(inputs)
    given = frozenset({1})
    other = {"self": [model[0]], "args": (torch.zeros(2),)}  # what is not read may be gone
    found = direct.inputs(other, (0, 1), given)
    assert found is not None
    assert found[0] is model[0]
    assert found[1] is other["args"][0]
    assert found[2] is None
    assert direct.inputs(other, (0, 2), given) is None
    assert direct.inputs({**scope, "self": [model[0], torch.zeros(1)]}, (0, 2), given) is None


def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows where Dynamo's code calls a graph."""
    made: list[Any] = []
    own = Caller.__call__

    def call(self: Caller, traced: Any, inputs: Any) -> Any:
        made.append(traced)
        return own(self, traced, inputs)

    monkeypatch.setattr(Caller, "__call__", call)
    return made


@pytest.mark.parametrize("make", [lambda model: model, quantised], ids=["plain", "quantised"])
@pytest.mark.parametrize("policy", [POLICY, Fora(8, 4)], ids=["partial", "reuse"])
def test_dynamos_code_runs_at_steps_that_compute_everything(
    policy: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(PlainDiT):
        """Of which no other model shares the trace."""

    model = make(randomize(Own()))
    opt = optimized(model, policy)
    steps(opt, noise(), TIMES)
    made = calls(monkeypatch)
    result = steps(opt, noise(), TIMES)
    assert len(made) == kinds(opt).count("f") == 2
    monkeypatch.setattr(Direct, "of", lambda *_: None)
    dynamo = optimized(model, policy)
    steps(dynamo, noise(), TIMES)
    before = len(made)
    assert torch.equal(result, steps(dynamo, noise(), TIMES))
    assert len(made) - before == 8


def test_guards_that_a_shared_trace_is_asked_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = [randomize(PlainDiT(), seed=seed) for seed in (1, 2)]
    opts = [optimized(model, Fora(8, 4)) for model in models]
    wanted = [steps(opt, noise(), TIMES) for opt in opts]
    asked, looked_up, own, every = list[Any](), list[Any](), guards_hold, Direct.every

    def hold(*given: Any) -> bool:
        asked.append(given)
        return own(*given)

    def look_up(self: Direct, scope: Any) -> Any:
        looked_up.append(scope)
        return every(self, scope)

    monkeypatch.setattr(traced, "guards_hold", hold)
    monkeypatch.setattr(Direct, "every", look_up)
    for opt, expected in zip(opts, wanted, strict=True):
        assert torch.equal(steps(opt, noise(), TIMES), expected)
        assert kinds(opt) == "frrrfrrr"
    assert len(asked) == len(looked_up) == 4  # in the place of Dynamo's code, which asks, too
    models[0].head.bias.requires_grad_(False)  # a guard of Dynamo's
    assert torch.equal(steps(opts[0], noise(), TIMES), wanted[0])
    assert len(looked_up) == 4


class Remembering(PlainDiT):
    """Keeps its last input."""

    last: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.last = x
        return super().forward(x, t, y)


def test_what_forward_leaves_in_the_model_is_left_at_each_step() -> None:
    model = randomize(Remembering())
    opt = optimized(model, Fora(8, 4))
    x = noise()
    with torch.no_grad():
        for t in TIMES * 2:
            x = x.clone()
            opt(x, torch.full((2,), t), torch.arange(2))
            assert model.last is x
    assert kinds(opt) == "frrrfrrr"


class Appending(PlainDiT):
    """Appends to a list that the caller gives."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, seen: list[Tensor]) -> Tensor:  # type: ignore[override]
        out = super().forward(x, t, y)
        seen.append(out)
        return out


def test_what_forward_leaves_with_the_caller_is_left_at_each_step() -> None:
    opt = optimized(randomize(Appending()), Fora(8, 4))
    with torch.no_grad():
        for t in TIMES * 2:
            seen: list[Tensor] = []
            out = opt(noise(), torch.full((2,), t), torch.arange(2), seen)
            assert len(seen) == 1
            assert seen[0] is out


def test_a_layer_that_is_replaced_in_a_sampling_is_seen_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(model: Any) -> Tensor:
        opt = optimized(model, Fora(8, 4))
        steps(opt, noise(), TIMES)
        x = steps(opt, noise(), TIMES[:2])
        model.head = copy.deepcopy(model.head)
        with torch.no_grad():
            model.head.weight.zero_()
        result = steps(opt, x, TIMES[2:3])
        assert kinds(opt) == "frr"
        return result - x

    move = replaced(randomize(PlainDiT()))
    monkeypatch.setattr(Direct, "of", lambda *_: None)
    assert torch.equal(move, replaced(randomize(PlainDiT())))
    assert torch.allclose(move, move[:1, :, :2, :2].repeat(2, 1, 4, 4), atol=1e-6)  # a patch of biases alone


def test_the_blocks_of_a_step_that_skips_them_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized(randomize(PlainDiT(depth=4)), BlockCache(8, first=0, interval=4))
    steps(opt, noise(), TIMES)
    looked: list[int] = []
    own = Direct.inputs

    def inputs(self: Direct, scope: Any, places: Any, given: Any) -> Any:
        looked.append(len(places))
        return own(self, scope, places, given)

    monkeypatch.setattr(Direct, "inputs", inputs)
    steps(opt, noise(), TIMES)
    everything = len(explain(opt).program.placeholders)
    assert len(looked) == 6
    assert max(looked) < everything / 2


class TwoTexts(PlainDiT):
    """Adds what two inputs say."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, y) + a.mean() - b.mean()


def test_inputs_that_were_one_tensor_may_be_two() -> None:
    model = randomize(TwoTexts())
    opts = [optimized(model, Fora(8, 4)) for _ in range(2)]
    a, b = torch.zeros(2, 4, 16), torch.full((2, 4, 16), 100.0)
    with torch.no_grad():
        for run in range(2):
            for i, t in enumerate(TIMES):
                call, other = (noise(), torch.full((2,), t), torch.arange(2)), b if run and i else a
                # Where one of them reuses, the other may compute.
                torch.testing.assert_close(opts[0](*call, a, other), opts[1](*call, a, other.clone()), rtol=0, atol=10)


@dataclass
class Scale:
    """An object that says a number."""

    by: float


class Strength(Enum):
    PLAIN, STRONG = 1.0, 3.0


class Scaled(PlainDiT):
    """Whose output is scaled by what an argument says."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, scale: Any = None) -> Tensor:
        out: Tensor = super().forward(x, t, y)
        return out * (scale.by if isinstance(scale, Scale) else scale.value if isinstance(scale, Strength) else 1.0)


@pytest.mark.parametrize("make", [Scale, Strength], ids=["object", "enum"])
def test_what_an_object_says_is_seen_at_each_step(make: Any) -> None:
    opt, x, y = optimized(randomize(Scaled()), Fora(8, 4)), noise(), torch.tensor([1, 2])
    for scales in ([1.0] * 8, [1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 3.0, 1.0]):
        with torch.no_grad():
            norms = [float(opt(x, torch.full((2,), t), y, make(s)).norm()) for t, s in zip(TIMES, scales, strict=True)]
        assert [round(norm / norms[0]) for norm in norms] == scales
