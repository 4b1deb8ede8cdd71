"""Models of one class share what Dynamo traced, where it would trace the same, and nothing else."""

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import toca_compile
from tests.models import PlainBlock, PlainDiT, randomize
from tests.runs import TIMES, kinds, steps
from tests.sampling import noise
from toca_compile import Fora, FullCompute, ToCa, optimize
from toca_compile.backend import compile_lock
from toca_compile.traced import Tracing

POLICY = ToCa(8, 4, 0.3, schedule="constant")


def fresh() -> Any:
    """A class that no other test knows."""

    class Own(PlainDiT):
        pass

    return Own


def run(opt: Any, times: list[int] = TIMES) -> tuple[Tensor, int]:
    """A sampling, and how many frames Dynamo followed in it."""
    before = counters["frames"]["total"]
    return steps(opt, noise(), times), counters["frames"]["total"] - before


def step(opt: Any) -> tuple[Tensor, int]:
    """The first step of one."""
    opt.reset()
    return run(opt, TIMES[:1])


@pytest.mark.parametrize("modes", [(False, False), (False, True), (True, False), (True, True)])
def test_weights_made_in_inference_mode(modes: tuple[bool, bool]) -> None:
    """Parameters that are inference tensors ask for gradients, which no trace may pass on."""
    own, policies = fresh(), (POLICY, Fora(8, 2))
    plain = randomize(own())
    wanted = [steps(optimize(plain, policy, lowering="eager"), noise(), TIMES) for policy in policies]
    with torch.inference_mode():
        model = randomize(own())
    for policy, mode, expected in zip(policies, modes, wanted, strict=True):
        with torch.inference_mode(mode), torch.no_grad():
            assert torch.equal(steps(optimize(model, policy, lowering="eager"), noise(), TIMES), expected)


def test_a_second_model_of_a_class_is_not_followed_again() -> None:
    own = fresh()
    models = [randomize(own(), seed=seed) for seed in (0, 1)]
    alone = [steps(optimize(copy.deepcopy(m), p, lowering="eager"), noise(), TIMES) for m, p in
             zip(models, (POLICY, Fora(8, 2)), strict=True)]  # fmt: skip
    gc.collect()
    first, second = (optimize(m, p, lowering="eager") for m, p in zip(models, (POLICY, Fora(8, 2)), strict=True))
    results = [run(opt) for opt in (first, second)]
    assert [frames for _, frames in results] == [1, 0]
    assert all(torch.equal(result, own) for (result, _), own in zip(results, alone, strict=True))
    assert (kinds(first), kinds(second)) == ("fpppfppp", "frfrfrfr")
    ours, theirs = (toca_compile.explain(opt) for opt in (second, first))
    assert ours.program.static_inputs == theirs.program.static_inputs
    assert any(line.startswith("inputs") and "x f32[2, 2, 8, 8]" in line for line in str(ours).splitlines())
    printed = [report.graphs() for report in (ours, theirs)]
    assert {"capture", "find-sites", "outline"} < printed[0].keys() & printed[1].keys()
    assert all(printed[0][name] == printed[1][name] for name in printed[0].keys() & printed[1].keys())


def test_it_outlives_the_model_that_was_traced_and_goes_with_the_last() -> None:
    own = fresh()
    first = optimize(randomize(own()), POLICY, lowering="eager")
    run(first)
    second = optimize(randomize(own(), seed=1), Fora(8, 2), lowering="eager")
    expected, _ = run(second)
    (shared,) = (t for t in Tracing.alive if t.kind is not None and t.kind[0] is own)
    model, tracing, graph = weakref.ref(first._model), weakref.ref(shared), weakref.ref(next(iter(shared.graphs)))
    del shared
    del first
    gc.collect()
    assert model() is None
    second.reset()
    result, frames = run(second)
    assert frames == 0
    assert torch.equal(result, expected)
    del second
    gc.collect()
    assert (tracing(), graph()) == (None, None)


def test_another_model_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fresh()

    class Patched(PlainBlock):
        """Its forward is replaced below."""

    def followed(change: Any = None, **settings: Any) -> tuple[Any, Tensor, int]:
        model: Any = randomize(own(**settings))
        if change is not None:
            change(model)
        opt = optimize(model, FullCompute(), lowering="eager")
        return opt, *run(opt)

    def other_block(model: Any) -> None:
        model.blocks[0].__class__ = Patched

    def own_forward(model: Any) -> None:
        before = model.head.forward
        model.head.forward = lambda x: before(x) * 2

    def half(self: PlainBlock, x: Tensor, c: Tensor) -> Tensor:
        return PlainBlock.forward(self, x, c) / 2

    first = followed()
    plain = first[1]
    assert followed()[2] == 0
    assert followed(depth=3)[2] == 1
    assert followed(lambda m: m.head.bias.requires_grad_(False))[2] == 1
    hooked, doubled, frames = followed(lambda m: m.head.register_forward_hook(lambda module, args, out: out * 2))
    assert frames == 1
    assert not torch.equal(doubled, plain)
    twin = copy.deepcopy(hooked._model)  # has hooks by the same numbers, and may have changed what they do
    (number,) = twin.head._forward_hooks
    twin.head._forward_hooks[number] = lambda module, args, out: out * 3
    opt = optimize(twin, FullCompute(), lowering="eager")
    tripled, frames = run(opt)
    assert frames == 1
    assert torch.allclose(steps(opt, noise(), TIMES[:1]), steps(twin, noise(), TIMES[:1]))
    assert not torch.equal(tripled, doubled)
    assert followed(own_forward)[2] >= 1
    before = followed(other_block)
    monkeypatch.setattr(Patched, "forward", half)
    after = followed(other_block)
    assert after[2] == 1
    assert not torch.equal(before[1], after[1])


class Switched(nn.Module):
    """A model that does more by a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PlainDiT()
        self.twice: Any = False

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.inner(x, t, y)
        return out * 2 if self.twice else out


def test_one_that_changes_goes_its_own_way() -> None:
    models: list[Any] = [randomize(Switched()) for _ in range(2)]
    opts = [optimize(m, Fora(8, 2), lowering="eager") for m in models]
    assert [run(opt)[1] for opt in opts] == [1, 0]
    models[1].twice = True
    first, frames = step(opts[1])
    assert frames == 1
    assert torch.equal(first, steps(models[1], noise(), TIMES[:1]))
    assert step(opts[0])[1] == 0
    opts[1].reset()
    _, frames = run(opts[1])
    assert frames == 0  # of code of its own
    assert kinds(opts[1]) == "frfrfrfr"
    models[1].twice = False
    assert torch.equal(step(opts[1])[0], step(opts[0])[0])


def test_models_of_a_class_in_two_threads() -> None:
    own = fresh()
    opts = [optimize(randomize(own(), seed=s), p, lowering="eager") for s, p in enumerate((POLICY, Fora(8, 2)))]
    expected = [run(opt)[0] for opt in opts]
    results: dict[int, Tensor] = {}

    def sample(i: int) -> None:
        with torch.no_grad():
            opts[i].reset()
            results[i] = steps(opts[i], noise(), TIMES)

    threads = [threading.Thread(target=sample, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(2))


def test_a_call_waits_while_another_thread_traces() -> None:
    started, over = threading.Event(), threading.Event()
    opt = optimize(randomize(fresh()()), Fora(8, 2), lowering="eager")

    def slow(x: Tensor) -> Tensor:
        started.set()
        over.wait(30)
        return x

    def elsewhere() -> None:
        with compile_lock:
            make_fx(slow)(torch.ones(2))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    started.wait(30)
    threading.Timer(0.3, over.set).start()
    result, frames = run(opt)
    thread.join()
    assert frames == 1
    assert torch.equal(result, run(opt)[0])
    assert kinds(opt) == "frfrfrfr"
