"""``optimize(pipe)`` and ``enable_cache`` leave users' objects in place, and ``restore`` gives back what was."""

import copy
import gc
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import toca_compile
from tests.models import PlainBlock, PlainDiT, randomize
from tests.pipelines import build, flux, run
from tests.sampling import noise
from toca_compile import Fora, FullCompute, TocaError
from toca_compile.in_place import tidy
from toca_compile.model import Calls

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def pipeline(policy: Any = None) -> tuple[Any, dict[str, Any]]:
    """A FLUX pipeline of two blocks, optimised if a policy is given."""
    pipe, call = build("FluxPipeline")
    pipe.transformer = flux(double=1, single=1)
    if policy is not None:
        toca_compile.optimize(pipe, policy, lowering="eager")
    return pipe, call


def kinds(pipe: Any) -> str:
    return "".join(r.kind.value[0] for r in pipe.transformer.steps)


def call_model(model: Any, steps: int = 4) -> list[Tensor]:
    x = noise()
    with torch.no_grad():
        return [model(x, torch.full((2,), 900 - 200 * i), torch.arange(2)) for i in range(steps)]


def test_the_objects_stay_what_they_are_and_restore_gives_back_what_was() -> None:
    gc.collect()
    tidy()  # what is watched for models that are gone
    others = list(Calls.alive)  # whose pipelines may be watched, before and after
    pipe, call = pipeline()
    run(pipe, call, 1)
    model, kept = pipe.transformer, [pipe, pipe.transformer]
    classes, before = [type(x) for x in kept], [dict(vars(x)) for x in kept]
    methods = [vars(type(pipe))["__call__"], diffusers.DiffusionPipeline.__setattr__]
    plain = run(pipe, call, 3)
    assert not toca_compile.is_optimized(pipe)
    assert toca_compile.optimize(pipe, Fora(50, 3), lowering="eager") is pipe
    assert pipe.transformer is model
    assert toca_compile.is_optimized(pipe)
    assert toca_compile.is_optimized(model)
    assert type(pipe) is classes[0]
    assert type(model) is classes[1]
    assert type(type(model).from_config(model.config)) is classes[1]  # a new model is not optimised
    assert not torch.equal(run(pipe, call, 3), plain)
    assert kinds(pipe) == "frr"
    gc.collect()
    assert toca_compile.restore(pipe) is pipe
    assert pipe.transformer is model
    assert not toca_compile.is_optimized(pipe)
    assert [type(x) for x in kept] == classes
    for x, was in zip(kept, before, strict=True):
        now = dict(vars(x))
        assert now.keys() == was.keys()
        assert {k for k in was if now[k] is not was[k] and now[k] != was[k]} <= {"_num_timesteps"}  # of the call
    ends = [methods, [vars(type(pipe))["__call__"], diffusers.DiffusionPipeline.__setattr__]]
    if others:
        ends = [[inspect.unwrap(method) for method in end] for end in ends]
    assert ends[0] == ends[1]
    assert torch.equal(run(pipe, call, 3), plain)
    assert toca_compile.disable_cache(pipe) is pipe  # nothing to undo


def test_pipelines_made_of_its_components_have_runs() -> None:
    """By hand and by ``from_pipe``, of the same class and of others; a transformer put into a pipeline that was there;
    another scheduler."""
    pipe, call = pipeline(Fora(50, 3))
    expected = run(pipe, call, 4)
    picture = {"image": torch.rand(1, 3, 16, 24), "strength": 0.6}
    again = type(pipe)(**pipe.components)
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    third, _ = pipeline()
    third.transformer = pipe.transformer
    for p, more, seen in (
        (again, {}, "frrf"),
        (other, picture, "frr"),
        (diffusers.FluxImg2ImgPipeline(**pipe.components), picture, "frr"),
        (third, {}, "frrf"),
    ):
        assert toca_compile.is_optimized(p)
        p.set_progress_bar_config(disable=True)
        result = run(p, call | more, 4)
        assert kinds(p) == seen, type(p)
        assert p.transformer.cache_bytes == 0
        assert more or torch.equal(result, expected)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    run(pipe, call, 3)
    assert kinds(pipe) == "frr"
    plain, _ = pipeline()  # of the same class, and not optimised
    assert run(plain, call, 2).isfinite().all()


def test_a_pickled_pipeline_is_optimised_where_it_is_read(tmp_path: Any) -> None:
    """Also where nothing is optimised yet, as in another process."""
    pipe, call = pipeline(Fora(50, 3))
    expected = run(pipe, call, 4)
    twin = copy.deepcopy(pipe)
    assert twin.transformer is not pipe.transformer
    assert torch.equal(run(twin, call, 4), expected)
    assert kinds(twin) == "frrf"
    data = pickle.dumps(pipe)
    pipe.save_pretrained(tmp_path)
    for p in (twin, pipe):
        toca_compile.restore(p)
    del twin
    gc.collect()
    read = pickle.loads(data)
    assert type(read) is type(pipe)
    assert torch.equal(run(read, call, 4), expected)
    assert kinds(read) == "frrf"
    model = type(pipe.transformer).from_pretrained(tmp_path / "transformer")
    assert not toca_compile.is_optimized(model)
    pipe.transformer = model
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    assert torch.equal(run(pipe, call, 4), expected)


def test_another_dtype() -> None:
    pipe, call = pipeline()
    plain, _ = pipeline()
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    for dtype in (torch.float32, torch.bfloat16):
        cast = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in call.items()}
        assert torch.equal(run(pipe.to(dtype), cast, 2), run(plain.to(dtype), cast, 2))
        assert kinds(pipe) == "ff"


class Named(PlainDiT):
    """A model with attributes of its own where an optimised model has others."""

    policy = "its own"

    def __init__(self) -> None:
        super().__init__()
        self.steps = 3
        self.cache_bytes = nn.Parameter(torch.ones(1))

    def reset(self) -> str:
        return "reset"

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * self.steps * self.cache_bytes


@pytest.mark.parametrize("made", [PlainDiT, Named])
def test_a_bare_model_in_place(made: Callable[[], nn.Module]) -> None:
    model = randomize(made())
    before, cls, plain = dict(vars(model)), type(model), call_model(model)
    assert toca_compile.enable_cache(model, Fora(4, 2), lowering="eager") is model
    assert isinstance(model, cls)
    first = call_model(model)
    controls = toca_compile.controls(model)
    assert [r.kind.value for r in controls.steps] == ["full", "reuse"] * 2
    assert [torch.equal(a, b) for a, b in zip(first, plain, strict=True)] == [True, False] * 2
    if made is Named:
        named: Any = model
        assert (named.policy, named.steps, named.reset(), named.cache_bytes.shape) == ("its own", 3, "reset", (1,))
        named.steps = 3
    for way in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = way(model)
        assert type(twin) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(call_model(twin), first, strict=True))
        assert len(toca_compile.controls(twin).steps) == 4
        assert len(controls.steps) == 4
    assert list(model.state_dict()) == list(randomize(made()).state_dict())
    controls.policy = Fora(4, 3)
    call_model(model)
    assert [r.kind.value[0] for r in controls.steps] == list("frrf")
    assert toca_compile.disable_cache(model) is model
    assert type(model) is cls
    assert vars(model) == before
    assert all(torch.equal(a, b) for a, b in zip(call_model(model), plain, strict=True))


def _class_changed(model: Any) -> None:
    """As parametrizations of torch do."""
    parametrize.register_parametrization(model, "positions", nn.Tanh())


def _method_of_a_class_replaced(model: Any) -> None:
    class Patched(PlainBlock):
        pass

    before = Patched.attention
    model.blocks[0].__class__ = Patched
    call_model(model)
    Patched.attention = lambda self, x: 2 * before(self, x)  # type: ignore


def _hook_of_all_modules(model: Any) -> Any:
    doubled: Any = lambda module, given, out: 2 * out if isinstance(module, nn.GELU) else None  # noqa: E731
    return register_module_forward_hook(doubled)


def _another_block(model: Any) -> None:
    class Quiet(PlainBlock):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + 0.5 * super().forward(x, c)

    kept.append(model.blocks[0])  # a block that is somebody else's goes on living
    model.blocks[0] = randomize(Quiet(16, 2))


kept: list[nn.Module] = []


@pytest.mark.parametrize("act", [_class_changed, _method_of_a_class_replaced, _hook_of_all_modules, _another_block])
def test_what_is_changed_between_two_samplings_is_met_by_the_second(act: Callable[[Any], Any]) -> None:
    """In its first step, and by it alone: it is a sampling as any other. torch.compile meets half of these."""
    model = randomize(PlainDiT(depth=1))
    toca_compile.enable_cache(model, Fora(4, 2), lowering="eager")
    before = call_model(model)
    hook = act(model)
    after = call_model(model)
    assert [r.kind.value for r in toca_compile.controls(model).steps] == ["full", "reuse"] * 2
    toca_compile.restore(model)
    plain = call_model(model)
    assert [torch.equal(a, b) for a, b in zip(after, plain, strict=True)] == [True, False] * 2
    assert not torch.equal(after[0], before[0])
    if hook is not None:
        hook.remove()


def test_a_wrapper_is_opened() -> None:
    """A wrapper of ours, or none: what is in it is optimised, and given back."""
    model = randomize(PlainDiT())
    opt = toca_compile.optimize(model, Fora(4, 2), lowering="eager")
    assert toca_compile.is_optimized(opt)
    assert not toca_compile.is_optimized(model)
    assert toca_compile.restore(opt) is model
    pipe, call = pipeline()
    inner = pipe.transformer
    wrapper = pipe.transformer = toca_compile.optimize(inner, Fora(4, 2), lowering="eager")
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    assert pipe.transformer is inner
    run(pipe, call, 4)
    assert kinds(pipe) == "frrf"
    toca_compile.restore(pipe)
    assert pipe.transformer is wrapper


def test_what_cannot_be_optimised_in_place() -> None:
    for act in (lambda: toca_compile.enable_cache(3, Fora()), lambda: toca_compile.restore(3)):
        with pytest.raises(TocaError, match="not int"):
            act()


def test_other_objects_of_the_class_are_compiled_as_ever() -> None:
    """Also by our backend."""
    mine, other = (randomize(PlainDiT()) for _ in range(2))
    toca_compile.enable_cache(mine, Fora(4, 2), lowering="eager")
    plain = call_model(other, 1)[0]
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    assert torch.equal(call_model(torch.compile(other, backend=backend), 1)[0], plain)
    assert len(graphs) == 1
    compiled: Any = torch.compile(other, backend="toca", options={"policy": Fora(4, 2), "lowering": "eager"})
    call_model(compiled)
    assert [r.kind.value for r in toca_compile.controls(compiled).steps] == ["full", "reuse"] * 2
    assert toca_compile.is_optimized(mine)
