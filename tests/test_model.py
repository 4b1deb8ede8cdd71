"""The object that ``optimize`` returns: copies of it."""

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, diffusers_dit, randomize
from tests.pipelines import build, run
from tests.runs import TIMES, kinds, optimized, steps
from tests.sampling import noise
from toca_compile import Fora, TocaError
from toca_compile.model import Calls


def _pickled(opt: Any) -> Any:
    return pickle.loads(pickle.dumps(opt))


def _saved(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, _pickled, _saved])
def test_copies_work_and_share_no_cache(way: Callable[[Any], Any]) -> None:
    model = diffusers_dit()
    opt = optimized(model, Fora(4, 2), grid=(4, 4))

    def sampled(net: Any) -> Tensor:
        x = noise()
        with torch.no_grad():
            for t in (900, 700, 500, 300):
                x = x - net(x, timestep=torch.full((2,), t), class_labels=torch.arange(2)).sample
        return x

    expected = sampled(opt)
    with torch.no_grad():
        opt(noise(seed=4), timestep=torch.full((2,), 900), class_labels=torch.arange(2))
    other = way(opt)
    assert type(other) is type(opt)
    assert other.cache_bytes == 0
    assert other.policy == opt.policy
    assert torch.equal(sampled(other), expected)
    assert toca_compile.explain(other).program.grid == (4, 4)
    if way is not copy.copy:
        assert next(other.parameters()) is not next(opt.parameters())


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, _pickled])
def test_pipelines_are_copied(way: Callable[[Any], Any]) -> None:
    pipe, call = build("DiTPipeline")
    toca_compile.optimize(pipe, Fora(4, 2), lowering="eager")
    expected = run(pipe, call, 4)
    other = way(pipe)
    assert torch.equal(run(other, call, 4), expected)
    assert len(other.transformer.steps) == 4
    assert isinstance(other, type(pipe))
    assert toca_compile.explain(other).schedule == "FRFR"


class Scaled(nn.Module):
    """A model with a setting that Dynamo makes a constant of its graph, as the scale of a LoRA is."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.scale = PlainDiT(), 1.0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y) * self.scale


@pytest.fixture
def looks() -> Iterator[list[int]]:
    """How often the model was looked at."""
    found: list[int] = []
    before = Calls._hooks

    def counted(self: Calls, model: nn.Module) -> Any:
        found.append(1)
        return before(self, model)

    with patch.object(Calls, "_hooks", counted):
        yield found


def test_the_model_is_looked_at_where_a_step_computes_everything(looks: list[int]) -> None:
    model: Any = randomize(Scaled())
    opt = optimized(model, Fora(8, 4))
    for _ in range(2):
        looks.clear()
        steps(opt, noise(), TIMES)
        assert kinds(opt) == "frrrfrrr"
        # Each first step of a sampling, each full one, and the second, before which nothing was compiled to be called.
        assert len(looks) <= 3


def test_what_changes_in_a_sampling_holds_from_the_next_full_step_on() -> None:
    model: Any = randomize(Scaled())
    opt = optimized(model, Fora(8, 4))
    steps(opt, noise(), TIMES)
    with torch.no_grad():
        for i, time in enumerate(TIMES):
            t = torch.full((2,), time)
            if i == 2:
                model.scale = 3.0
            out = opt(noise(), t, torch.arange(2))
            if i in (0, 4):
                assert torch.equal(out, model(noise(), t, torch.arange(2)))
    assert kinds(opt) == "frrrfrrr"


def test_a_sampling_that_begins_early_looks_at_the_model(looks: list[int]) -> None:
    """The call looked like the next step of one that goes on."""
    model: Any = randomize(Scaled())
    opt = optimized(model, Fora(8, 4))
    steps(opt, noise(), TIMES)
    steps(opt, noise(), TIMES[:3])
    model.scale = 3.0
    looks.clear()
    with torch.no_grad():
        x, t = noise(seed=7), torch.full((2,), TIMES[0])
        assert torch.equal(opt(x, t, torch.arange(2)), model(x, t, torch.arange(2)))
    assert looks
    assert kinds(opt) == "f"


@pytest.fixture
def hooked() -> Iterator[tuple[Any, Any]]:
    """A model that was given a hook after two steps of its second sampling, and it optimised."""
    model: Any = randomize(PlainDiT())
    opt = optimized(model, Fora(8, 4))
    steps(opt, noise(), TIMES)
    steps(opt, noise(), TIMES[:2])
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, out: out + 1)
    with torch.no_grad():
        yield model, opt
    handle.remove()


def test_hooks_that_are_new_are_met_at_the_next_full_step(hooked: tuple[Any, Any]) -> None:
    model, opt = hooked
    for i, time in enumerate(TIMES[2:5], 2):
        t = torch.full((2,), time)
        out = opt(noise(), t, torch.arange(2))
        if i == 4:
            torch.testing.assert_close(out, model(noise(), t, torch.arange(2)), rtol=1e-6, atol=1e-6)


def test_hooks_are_met_with_a_layer_that_is_new_at_the_next_step(hooked: tuple[Any, Any]) -> None:
    model, opt = hooked
    model.head = randomize(nn.Linear(16, 8))
    t = torch.full((2,), TIMES[2])
    out = opt(noise(), t, torch.arange(2))
    torch.testing.assert_close(out, model(noise(), t, torch.arange(2)), rtol=1e-6, atol=1e-6)


def test_other_shapes_and_modes_are_no_step_of_the_sampling(looks: list[int]) -> None:
    model: Any = randomize(Scaled())
    opt = optimized(model, Fora(8, 4))
    steps(opt, noise(), TIMES)
    steps(opt, noise(), TIMES[:2])
    looks.clear()
    with torch.no_grad():
        x, t = noise(3), torch.full((3,), TIMES[2])
        assert torch.equal(opt(x, t, torch.arange(3)), model(x, t, torch.arange(3)))
    with torch.inference_mode():
        opt(noise(), torch.full((2,), TIMES[2]), torch.arange(2))
    assert len(looks) == 2


def test_another_lowering_traces_nothing_anew() -> None:
    opt = optimized(randomize(PlainDiT(depth=1)))

    def gathers() -> bool:
        return any("toca.gather_tokens(" in text for text in toca_compile.explain(opt).graphs().values())

    expected = steps(opt, noise(), TIMES)
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert gathers()
    steps(opt, noise(), TIMES[:3])
    opt.lowering = "dense"  # in a sampling: the next call begins another
    torch.testing.assert_close(steps(opt, noise(), TIMES), expected, rtol=1e-4, atol=1e-5)
    assert not gathers()
    with pytest.raises(TocaError, match="tvm"):
        opt.lowering = "tvm"
    assert opt.lowering == "dense"
    opt.lowering = "eager"
    assert torch.equal(steps(opt, noise(), TIMES), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced
    assert toca_compile.summary(opt).recompiles == 0


class _Counting(PlainDiT):
    """It counts its calls, as forwards do that are put into a model to skip some."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.calls = 0

    def forward(self, *args: Any) -> Tensor:
        self.calls += 1
        return super().forward(*args) * (1 if self.calls % 1000 else 2)


class _Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        return self.model(*args)


def test_a_model_that_is_traced_at_each_call_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    opt = optimized(randomize(_Counting()), Fora(8, 4))
    steps(opt, noise(), TIMES[:5])
    assert kinds(opt) == "f" * 5
    (said,) = [r.getMessage() for r in caplog.records if "at each of the last calls" in r.getMessage()]
    assert "self.calls == 0" in said
    assert "out of a pipeline no cache is reused" in said


def test_in_a_pipeline_a_model_that_is_traced_at_each_call_reuses_its_caches_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []
    (pipe, call), (plain, _) = (build("FluxPipeline") for _ in range(2))
    for net in (pipe, plain):
        toca_compile.optimize(net, Fora(50, 3), lowering="eager")
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(len(calls)))
    assert torch.equal(run(pipe, call, 6), run(plain, call, 6))
    assert kinds(pipe.transformer) == "frrfrr"
    (said,) = [r.getMessage() for r in caplog.records if "at each of the last calls" in r.getMessage()]
    assert "longer than caching saves" in said
    assert "torch.compiler.disable" in said


def test_torch_compile_around_an_optimised_model_changes_nothing() -> None:
    """Nor does code that is compiled and calls it; and torch.compile's wrapper is known for what it holds."""
    model = randomize(PlainDiT(depth=1))
    opt = optimized(model, Fora(8, 4))
    expected = steps(opt, noise(), TIMES)
    around: Any = torch.compile(opt, backend="eager")
    assert torch.equal(steps(around, noise(), TIMES), expected)
    assert kinds(around) == kinds(opt) == "frrrfrrr"
    assert toca_compile.is_optimized(around)
    assert str(toca_compile.explain(around)) == str(toca_compile.explain(opt))
    assert toca_compile.restore(around) is model

    toca_compile.enable_cache(model, Fora(8, 4), lowering="eager")
    around = torch.compile(model, backend="eager")
    loop = torch.compile(lambda x, t, y: model(x, t, y) * 1.0, backend="eager")
    for net in (around, loop):
        assert torch.equal(steps(net, noise(), TIMES), expected)
        assert kinds(toca_compile.controls(model)) == "frrrfrrr"
    assert toca_compile.restore(around) is around
    assert not toca_compile.is_optimized(model)
    steps(around, noise(), TIMES[:1])


def test_torch_compile_of_a_plain_model_is_not_taken_for_one_of_an_optimised_one() -> None:
    """Also where it saw the plain model first: around the models, around what holds them, and with them as arguments."""

    class Own(PlainDiT):
        pass

    class Around(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            return self.model(*args) * 1.0

    plain, model = (randomize(Own(depth=1)) for _ in range(2))
    toca_compile.enable_cache(model, Fora(8, 4), lowering="eager")
    given = torch.compile(lambda model, *args: model(*args) * 1.0, backend="eager")
    ways: list[Callable[[nn.Module], Any]] = [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.compile(Around(m), backend="eager"),
        lambda m: functools.partial(given, m),
    ]
    expected = steps(model, noise(), TIMES)
    for way in ways:
        steps(way(plain), noise(), TIMES[:2])
        toca_compile.controls(model).reset()
        assert torch.equal(steps(way(model), noise(), TIMES), expected)
        assert kinds(toca_compile.controls(model)) == "frrrfrrr"
    toca_compile.restore(model)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_what_keeps_dynamo_from_the_model_is_named() -> None:
    model = randomize(PlainDiT(depth=1))
    opt = optimized(model, Fora(8, 4))
    x, t, y = noise(), torch.full((2,), 900), torch.arange(2)
    with torch.no_grad():
        with pytest.raises(TocaError, match=r"within a transform of torch\.func"):
            torch.func.vmap(lambda x: opt(x, t, y))(x[None])
        toca_compile.enable_cache(model, Fora(8, 4), lowering="eager")
        with pytest.raises(TocaError, match=r"being exported.*toca_compile\.export"):
            torch.export.export(_Around(model), (x, t, y), strict=False)
    toca_compile.restore(model)


def test_a_forward_put_around_the_wrapper() -> None:
    """It may call what was there; one that calls the model instead leaves caching out, and is told so."""
    model = randomize(PlainDiT(depth=1))
    opt = optimized(model, Fora(8, 4))
    before, expected = opt.forward, steps(opt, noise(), TIMES)
    opt.forward = lambda *given: before(*given)
    assert torch.equal(steps(opt, noise(), TIMES), expected)
    opt.forward = lambda *given: model(*given)
    with pytest.raises(TocaError, match=r"forward of what optimize returned was replaced.*assign it to the model"):
        steps(opt, noise(), TIMES[:1])


def test_compile_as_torch_has_it_is_refused() -> None:
    opt = optimized(PlainDiT(depth=1), Fora(8, 4))
    for asked in ({}, {"backend": "eager"}, {"mode": "reduce-overhead", "fullgraph": True}):
        with pytest.raises(TocaError, match="is compiled already, with caching"):
            opt.compile(**asked)
