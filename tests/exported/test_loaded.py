"""A loaded model is the live one: its steps, caches, contexts, and errors; without a compiler (``tests/in_memory.py``)."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.in_memory import POLICIES, STEPS, loaded
from tests.models import PlainDiT, Texted, diffusers_dit, randomize
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import (
    ExportError,
    Fora,
    FullCompute,
    LoadedModel,
)

INPUTS = (noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2))


@pytest.fixture(scope="module")
def model(_shared: Traced) -> nn.Module:
    model: nn.Module = _shared(PlainDiT, depth=2)[0]
    return model


@pytest.fixture(scope="module")
def toca(model: nn.Module) -> LoadedModel:
    return loaded(model, POLICIES[2], INPUTS)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: str(p)[:60])
def test_a_run_is_the_live_one_and_so_is_the_next(traced: Traced, policy: Any) -> None:
    """Bit by bit: the same graphs run op by op. The table tells the same steps, numbers and buffers."""
    model, live = traced(PlainDiT, policy, depth=2)
    own = loaded(model, policy, INPUTS)
    for seed in range(2):
        assert torch.equal(sample(live, STEPS, noise(seed=seed)), sample(own, STEPS, noise(seed=seed)))
        assert [(r.kind, r.k) for r in live.steps] == [(r.kind, r.k) for r in own.steps]
    assert own.policy == policy
    assert own.cache_bytes == live.cache_bytes
    if policy.__class__ is not FullCompute:
        assert len({r.kind for r in own.steps}) > 1


@pytest.mark.parametrize("hoist", [True, False])
def test_what_follows_from_the_text_and_from_the_time(hoist: bool) -> None:
    """Texts that change from run to run and, in place, within one; times that come in another order."""
    model = randomize(Texted())
    live = toca_compile.optimize(model, Fora(4, 2), lowering="eager", hoist=hoist)
    text = torch.randn(2, 5, 8)
    own = loaded(model, Fora(4, 2), (*INPUTS[:2], text), hoist=hoist)
    assert bool(own._table.constant) is hoist
    for times in ([9, 7, 5, 3], [8, 7, 6, 3]):
        for t in times:
            given = noise(seed=t), torch.full((2,), t), text
            with torch.no_grad():
                assert torch.equal(live(*given), own(*given))
            text *= 1.5 if t == 7 else 1
        text = text + 1


class Telling(PlainDiT):
    """Hands out what it makes of the time, too."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return super().forward(x, t, y), self.prepare(x, t, y)[1][:, None]


def test_who_writes_to_what_is_handed_out_changes_no_later_step() -> None:
    model = randomize(Telling())
    files = [loaded(model, Fora(4, 2), INPUTS) for _ in range(2)]
    with torch.no_grad():
        for t in [9, 7, 5, 3] * 2:
            ours, theirs = (file(noise(seed=t), torch.full((2,), t), INPUTS[2]) for file in files)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            for value in theirs:
                value.mul_(10)


def test_reset_begins_a_run_anew(toca: LoadedModel) -> None:
    first = sample(toca, STEPS, noise())
    sample(toca, 3, noise(seed=5))
    toca.reset()
    assert torch.equal(sample(toca, STEPS, noise()), first)
    assert [r.index for r in toca.steps] == list(range(STEPS))


def test_two_have_two_caches(model: nn.Module, toca: LoadedModel) -> None:
    twin = loaded(model, POLICIES[2], INPUTS)
    x, other = noise(), noise(seed=3)
    with torch.no_grad():
        for i in range(STEPS):
            t = torch.full((2,), 900 - i)
            x, other = x - toca(x, t, INPUTS[2]) / STEPS, other - twin(other, t, INPUTS[2]) / STEPS
    for seed, result in ((0, x), (3, other)):
        y, alone = noise(seed=seed), loaded(model, POLICIES[2], INPUTS)
        with torch.no_grad():
            for i in range(STEPS):
                y = y - alone(y, torch.full((2,), 900 - i), INPUTS[2]) / STEPS
        assert torch.equal(result, y)


def test_contexts_are_runs_of_their_own(traced: Traced, toca: LoadedModel) -> None:
    _, live = traced(PlainDiT, POLICIES[2], depth=2)
    for opt in (live, toca):
        opt.reset()

    def guided(opt: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            for i in range(STEPS):
                t = torch.full((2,), 900 - i)
                with opt.cache_context("cond", step_index=i):
                    cond = opt(x, t, INPUTS[2])
                with opt.cache_context("uncond", step_index=i):
                    x = x - (2 * cond - opt(x, t, INPUTS[2] + 1)) / STEPS
        return x

    assert torch.equal(guided(live, noise()), guided(toca, noise()))
    assert {r.context for r in toca.steps} == {"cond", "uncond"}


def test_threads_have_runs_of_their_own(toca: LoadedModel) -> None:
    toca.reset()
    alone = [sample(toca, STEPS, noise(seed=seed)) for seed in range(2)]
    made: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda s=seed: made.update({s: sample(toca, STEPS, noise(seed=s))}))
        for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert torch.equal(made[seed], alone[seed])


def test_strides_and_modes_of_the_caller(toca: LoadedModel) -> None:
    """Inputs that lie otherwise in memory, and runs that begin in inference mode and end outside."""
    toca.reset()
    expected = sample(toca, STEPS, noise())
    x = noise()
    for i in range(STEPS):
        t = torch.full((1,), (STEPS - 1 - i) * 1000 // STEPS).expand(2)
        laid = x.to(memory_format=torch.channels_last)
        with torch.inference_mode() if i < 4 else torch.no_grad():
            x = (x - toca(laid, t=t, y=torch.arange(2)) / STEPS).clone()
    assert torch.equal(x, expected)


def test_results_are_nobodys_cache(toca: LoadedModel) -> None:
    toca.reset()
    with torch.no_grad():
        made = [toca(INPUTS[0], torch.full((2,), 900 - i), INPUTS[2]) for i in range(STEPS)]
        before = [x.clone() for x in made]
        toca(INPUTS[0], torch.full((2,), 900), INPUTS[2])
    assert all(torch.equal(a, b) for a, b in zip(made, before, strict=True))


def test_other_weights(traced: Traced, model: nn.Module) -> None:
    own, (other, live) = loaded(model, POLICIES[2], INPUTS), traced(PlainDiT, POLICIES[2], depth=2, which=1)
    randomize(other, seed=1)
    sample(own, 3, noise())
    own.update_weights(other.state_dict())
    expected = sample(live, STEPS, noise())
    assert torch.equal(sample(own, STEPS, noise()), expected)
    assert own.state_dict().keys() == model.state_dict().keys()
    for wrong, why in (({"head.wight": torch.ones(1)}, "no weight 'head.wight'"), ({"head.bias": torch.ones(3)}, "is")):
        with pytest.raises(ExportError, match=why):
            own.update_weights({"positions": torch.zeros(1, 16, 16), **wrong})
    assert torch.equal(sample(own, STEPS, noise()), expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((noise(1), *INPUTS[1:]), {}, r"exported for x of shape \[2, 2, 8, 8\].* called with \[1, 2, 8, 8\]"),
        ((noise().double(), *INPUTS[1:]), {}, r"float32.*float64"),
        (INPUTS[:2], {}, "without"),
        ((*INPUTS[:2], 3), {}, "y"),
        (INPUTS, {"scale": 2.0}, "scale"),
    ],
)
def test_other_calls_are_refused_and_the_run_goes_on(
    toca: LoadedModel, args: tuple[Any, ...], kwargs: dict[str, Any], why: str
) -> None:
    toca.reset()
    with torch.no_grad():
        toca(*INPUTS)
    with pytest.raises(ExportError, match=why):
        toca(*args, **kwargs)
    assert len(toca.steps) == 1


BATCH = {name: {0: torch.export.Dim("batch", min=2, max=5)} for name in "xty"}


@pytest.mark.parametrize("policy", [POLICIES[2], POLICIES[8], POLICIES[12]], ids=lambda p: str(p)[:20])
def test_any_batch_of_a_range(traced: Traced, policy: Any) -> None:
    """Bit by bit at the sizes that were traced and at another, with caches of the run's size; others are refused."""
    model, live = traced(PlainDiT, policy, depth=2)
    own = loaded(model, policy, INPUTS, dynamic=BATCH)
    for count in (2, 4, 5):
        assert torch.equal(sample(live, STEPS, noise(count)), sample(own, STEPS, noise(count)))
        assert [(r.kind, r.k) for r in live.steps] == [(r.kind, r.k) for r in own.steps]
    with torch.no_grad():
        for count in (5, 2):
            live.reset()
            own.reset()
            for opt in (live, own):
                opt(noise(count), torch.zeros(count, dtype=torch.int64), torch.arange(count))
            assert own.cache_bytes == live.cache_bytes
    for count, labels, why in (
        (1, 1, "for batch from 2 to 5"),
        (6, 6, r"of x from 2 to 5.*\[6, 2, 8, 8\]"),
        (3, 2, "y of"),
    ):
        with pytest.raises(ExportError, match=why):
            own(noise(count), torch.zeros(count, dtype=torch.int64), torch.arange(labels))


def test_sizes_take_turns_and_do_not_mix(model: nn.Module) -> None:
    """Each has a run of its own; one that the caller says is the next step of another's is refused."""
    own = loaded(model, POLICIES[1], INPUTS, dynamic=BATCH)
    alone = {count: sample(own, STEPS, noise(count)) for count in (2, 3)}
    x = {count: noise(count) for count in alone}
    with torch.no_grad():
        for i in range(STEPS):
            for count in x:
                t = torch.full((count,), (STEPS - 1 - i) * 1000 // STEPS)
                with own.cache_context(str(count)):
                    x[count] = x[count] - own(x[count], t, torch.arange(count)) / STEPS
        assert all(torch.equal(x[count], alone[count]) for count in x)
        own.reset()
        for i, count in enumerate((2, 3)):
            inputs = noise(count), torch.full((count,), 900 - 100 * i), torch.arange(count)
            with own.cache_context("default", step_index=i):
                if count == 2:
                    own(*inputs)
                    continue
                with pytest.raises(ExportError, match="batch changed in the midst of a run"):
                    own(*inputs)


def test_results_with_names_and_arguments_that_are_no_tensors() -> None:
    model = diffusers_dit(depth=1)
    call = {"hidden_states": noise(), "timestep": torch.ones(2), "class_labels": torch.arange(2)}
    with torch.no_grad():
        expected = model(**call)
        named, plain = loaded(model, Fora(4, 2), call), loaded(model, Fora(4, 2), {**call, "return_dict": False})
        assert torch.equal(named(**call).sample, expected.sample)
        assert torch.equal(named(**call, return_dict=True)[0], expected[0])
        assert torch.equal(plain(**call, return_dict=False)[0], expected[0])
        with pytest.raises(ExportError, match=r"exported for return_dict=True.* with return_dict=False"):
            named(**call, return_dict=False)
    assert named.config.num_layers == 1
    assert (named.dtype, named.device) == (torch.float32, torch.device("cpu"))
    named.to("cpu")
    with pytest.raises(ExportError, match="export it anew"):
        named.to(torch.float16)
