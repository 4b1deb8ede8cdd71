"""What can be exported, and what is refused with which reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.in_memory import loaded, written
from tests.models import Halved, PlainDiT, randomize
from tests.pair import Pair
from tests.pipelines import build, run
from tests.runs import optimized
from tests.sampling import noise, sample
from toca_compile import ExportError, Fora, NoSiteError, PolicyError, ToCa
from toca_compile.exported.write import traces
from toca_compile.ir.signature import Signature
from toca_compile.policies import Level, Planned, Polynomial

INPUTS = (noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2))


class Broken(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, t, y)


class Odd(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return {super().forward(x, t, y)}


@pytest.mark.parametrize(
    ("model", "error", "why"),
    [
        (Halved(depth=2), ExportError, "Halved cannot be exported: torch.compile split it"),
        (Odd(depth=1), ExportError, "returns a set"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_models_that_no_file_can_hold(model: nn.Module, error: type[Exception], why: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=why):
        toca_compile.export(model.eval(), Fora(4, 2), INPUTS, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_hooks_that_change_arguments_or_results_are_named(tmp_path: Path) -> None:
    model = randomize(PlainDiT(depth=1))
    before = model.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(ExportError, match="PlainDiT has hooks"):
        toca_compile.export(model, Fora(4, 2), INPUTS, tmp_path / "m.pt2")
    before.remove()
    model.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ExportError, match="PlainDiT has hooks"):
        toca_compile.export(model, Fora(4, 2), INPUTS, tmp_path / "m.pt2")


class Branching(PlainDiT):
    """Otherwise for four samples: between the sizes that are traced."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[0] == 4 else x, t, y)


class Mean(PlainDiT):
    """With a number that follows from the batch."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x * (1 / x.shape[0]), t, y)


BATCH, TOKENS = torch.export.Dim("batch", min=2, max=9), torch.export.Dim("height", min=2, max=4)
OPEN = {name: {0: BATCH} for name in "xty"}


@pytest.mark.parametrize(
    ("cls", "open", "why"),
    [
        (Branching, OPEN, "Branching cannot be exported for batch from 2 to 9; torch.export says"),
        (Mean, OPEN, "Mean cannot be exported for batch from 2 to 9: an argument of aten.mul.Tensor at test_write.py"),
        (PlainDiT, {"x": {2: 2 * TOKENS}}, "PlainDiT fails where height is 2"),
        (PlainDiT, {"x": {0: BATCH, 1: TOKENS}}, "one size can be open, and dynamic names batch, height"),
        (PlainDiT, {"x": {0: torch.export.Dim("batch")}}, "checked up to a largest size"),
        (PlainDiT, {"x": {0: torch.export.Dim("batch", min=1, max=4)}}, "a range begins at 2"),
        (PlainDiT, {"z": {0: BATCH}}, "'z', which is none of the arguments x, t, y"),
        (PlainDiT, {"x": {9: BATCH}}, "dynamic of x must be"),
        (PlainDiT, {"x": {0: torch.export.Dim.AUTO}}, "dynamic of x must be"),
        (PlainDiT, {}, "dynamic names none"),
        (PlainDiT, 3, "must say which dimensions"),
    ],
)
def test_ranges_that_no_file_can_hold(cls: Any, open: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=why):
        toca_compile.export(randomize(cls(depth=1)), Fora(4, 2), INPUTS, tmp_path / "m.pt2", dynamic=open, hoist=False)
    assert not list(tmp_path.iterdir())


class Expanded(PlainDiT):
    """With a buffer whose dimensions share memory, and one that is a view of a larger one."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.register_buffer("shift", torch.arange(2.0)[:, None, None].expand(2, 8, 8))
        self.register_buffer("scale", torch.arange(1000.0)[3:400:3][:2, None, None])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x * self.scale + self.shift, t, y)


def test_weights_are_held_in_their_strides_without_the_memory_around_them() -> None:
    model = Expanded().eval()
    own = loaded(model, Fora(4, 2), INPUTS)
    with torch.no_grad():
        assert torch.equal(own(*INPUTS), model(*INPUTS))
    held = own.state_dict()
    for name, buffer in model.named_buffers():
        assert held[name].stride() == buffer.stride()
        assert held[name].untyped_storage().nbytes() <= 16


OUTSIDE = torch.ones(2, 1, 1, 1)


class Global(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x * OUTSIDE, t, y)


def test_a_tensor_of_nobody_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither an argument nor its own"):
        toca_compile.export(randomize(Global(depth=1)), Fora(4, 2), INPUTS, tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("policy", "inputs", "name", "error", "why"),
    [
        (Fora(4, 2), INPUTS, "m.pt", ExportError, r"must be called \*\.pt2"),
        (Fora(4, 2), INPUTS, "none/m.pt2", ExportError, "there is no folder"),
        (Fora(4, 2), 3, "m.pt2", ExportError, "tuple or a dictionary"),
        (None, INPUTS, "m.pt2", PolicyError, "a policy is needed"),
        ("nothing", INPUTS, "m.pt2", PolicyError, "nothing"),
    ],
)
def test_arguments_of_export(
    policy: Any, inputs: Any, name: str, error: type[Exception], why: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=why):
        toca_compile.export(randomize(PlainDiT(depth=1)), policy, inputs, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_optimised_keeps_its_policy_and_its_run() -> None:
    model = randomize(PlainDiT(depth=2))
    live = optimized(model, ToCa(8, interval=4, fresh_ratio=0.3))
    expected = sample(live, 8, noise())
    with torch.no_grad():
        for i in range(3):
            live(noise(), torch.full((2,), 900 - i), INPUTS[2])
    own = loaded(live, None, INPUTS)
    assert own.policy == live.policy
    assert torch.equal(sample(own, 8, noise()), expected)
    assert [r.index for r in live.steps] == [0, 1, 2]
    in_place = toca_compile.enable_cache(model, Fora(8, 2), lowering="eager")
    own = loaded(in_place, None, INPUTS)
    assert torch.equal(sample(own, 8, noise()), sample(in_place, 8, noise()))


def test_one_tensor_given_twice_is_two_arguments() -> None:
    model = randomize(PlainDiT(depth=1))
    twice = torch.arange(2)
    own = loaded(model, Fora(4, 2), (noise(), twice, twice))
    with torch.no_grad():
        assert torch.equal(own(noise(), torch.tensor([7, 8]), twice), model(noise(), torch.tensor([7, 8]), twice))


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "PixArtAlphaPipeline"])
def test_a_loaded_transformer_in_the_unmodified_pipeline(name: str) -> None:
    pipe, call = build(name)
    policy = Fora(6, 3)
    own = loaded(pipe, policy, call | {"num_inference_steps": 6})
    toca_compile.optimize(pipe, policy, lowering="eager")
    expected = [run(pipe, call, 6), run(pipe, call, 6)]
    toca_compile.restore(pipe)
    plain = run(pipe, call, 6)
    pipe.transformer = own
    for before in expected:
        made = run(pipe, call, 6)
        assert torch.equal(made, before)
        assert not torch.equal(made, plain)
    assert own.cache_bytes == 0


def test_pipelines_that_no_file_can_hold() -> None:
    pipe, call = build("FluxPipeline")
    with pytest.raises(ExportError, match="dictionary of the arguments"):
        loaded(pipe, Fora(6, 3), (noise(),))
    pipe.transformer = None
    with pytest.raises(ExportError, match="has no transformer"):
        loaded(pipe, Fora(6, 3), call)


def test_two_transformers_that_share_the_steps() -> None:
    """Each is planned for the steps from its own first one on, and runs in the unmodified pipeline."""
    pipe = Pair()
    made = traces(pipe, Level("balanced"), {"num_inference_steps": 12})
    assert [len(one.table.steps) for one in made.values()] == [12, 6]

    def run() -> Tensor:
        return pipe(12, generator=torch.Generator().manual_seed(0))[0]

    plain, own = (pipe.transformer, pipe.transformer_2), {name: written(one) for name, one in made.items()}
    toca_compile.optimize(pipe, Level("balanced"), lowering="eager")
    expected = run()
    toca_compile.restore(pipe)
    assert (pipe.transformer, pipe.transformer_2) == plain
    uncached = run()
    for name, model in own.items():
        setattr(pipe, name, model)
    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)
    assert not torch.equal(expected, uncached)


def test_a_plan_that_was_found_keeps_its_full_steps_in_a_pipeline() -> None:
    """It is laid out by the scheduler's times, as in the live pipeline, and refused where that would refuse it."""
    pipe, inputs = Pair(), {"num_inference_steps": 12}
    late = Planned(6, (0, 1, 4, 5), Polynomial(1), made_for=Signature(times=(1000.0, 990.0, 980.0, 970.0, 500.0, 0.0)))
    own = {name: written(one) for name, one in traces(pipe, late, inputs).items()}
    toca_compile.optimize(pipe, late, lowering="eager")
    expected = pipe(12, generator=torch.Generator().manual_seed(0))[0]
    wanted = {name: [r.kind for r in getattr(pipe, name).steps] for name in own}
    toca_compile.restore(pipe)
    for name, model in own.items():
        setattr(pipe, name, model)
    assert torch.equal(pipe(12, generator=torch.Generator().manual_seed(0))[0], expected)
    assert {name: [r.kind for r in model.steps] for name, model in own.items()} == wanted
    even = late.for_run(12, guided=False)
    assert own["transformer"].policy.full != even.full
    with pytest.raises(PolicyError, match="made for another sampler"):
        traces(Pair(), replace(late, made_for=Signature(sampler="Other")), inputs)


def test_a_transformer_that_a_call_leaves_out() -> None:
    with pytest.raises(ExportError, match=r"Pair does not call its transformer$"):
        traces(Pair(), Fora(6, 3), {"num_inference_steps": 1})


def test_no_site_is_the_compilers_error() -> None:
    with pytest.raises(NoSiteError):
        loaded(nn.Sequential(nn.Linear(4, 4)).eval(), Fora(4, 2), (torch.ones(2, 4),))
