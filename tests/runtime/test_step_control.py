"""Runs stay apart: contexts, restarts, shapes, exceptions, graph breaks. No stale cache is ever read."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import Fora, FullCompute, ToCa
from toca_compile.runtime.executor import Executor

POLICY = ToCa(num_steps=8, interval=4, fresh_ratio=0.3, schedule="constant")


@pytest.fixture
def model() -> PlainDiT:
    return randomize(PlainDiT())  # type: ignore[return-value]


def optimized(model: nn.Module, policy: Any = POLICY, **options: Any) -> Any:
    return toca_compile.optimize(model, policy, lowering="eager", **options)


def kinds(opt: Any) -> str:
    return "".join(r.kind.value[0] for r in opt.steps)


def test_records(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    sample(opt, 8, noise())
    assert kinds(opt) == "fpppfppp"
    assert [r.index for r in opt.steps] == list(range(8))
    assert opt.steps[1].k == {f"blocks.{i}{part}": k for i in range(2) for part, k in (("", 0), (".mlp", 4))}


def test_the_next_run_begins_after_the_last_step(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    first, second = sample(opt, 8, noise()), sample(opt, 8, noise())
    assert torch.equal(first, second)
    assert kinds(opt) == "fpppfppp"


def test_reset_begins_a_run(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    clean = sample(opt, 8, noise())
    sample(opt, 3, noise(seed=5))
    opt.reset()
    assert opt.cache_bytes == 0
    assert torch.equal(sample(opt, 8, noise()), clean)


def test_an_interrupted_run_is_noticed_by_its_clock(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    clean = sample(opt, 8, noise())
    partial_run(opt, calls=3)
    assert torch.equal(sample(opt, 8, noise()), clean)


def test_a_sampler_that_adds_noise_does_not_begin_anew(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    with torch.no_grad():
        for t in (900, 800, 830, 700, 730, 600, 630, 500):
            opt(noise(), torch.full((2,), t), torch.arange(2))
    assert kinds(opt) == "fpppfppp"


def partial_run(opt: Any, calls: int) -> None:
    with torch.no_grad():
        for i in range(calls):
            opt(noise(seed=7), torch.full((2,), 900 - 100 * i), torch.arange(2))


def test_more_calls_than_steps_begin_again(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    with torch.no_grad():
        for i in range(11):
            opt(noise(), torch.full((2,), 900 - 50 * i), torch.arange(2))
    assert kinds(opt) == "fpp"


@pytest.mark.parametrize("change", ["batch", "dtype", "policy"])
def test_another_shape_or_policy_begins_a_run(traced: Traced, change: str) -> None:
    model = randomize(PlainDiT())
    opt = traced(PlainDiT, POLICY)[1] if change == "policy" else optimized(model)
    partial_run(opt, 2)
    if change == "policy":
        opt.policy = Fora(num_steps=6, interval=3)
        sample(opt, 6, noise())
        assert kinds(opt) == "frrfrr"
        _, other = traced(PlainDiT, Fora(6, 3), which=1)
        assert torch.equal(sample(opt, 6, noise()), sample(other, 6, noise()))
        return
    same, x = randomize(PlainDiT()), noise(3)
    if change == "dtype":
        model.double()
        same.double()
        x = noise().double()
    result = sample(opt, 8, x)
    assert kinds(opt) == "fpppfppp"
    assert torch.equal(result, sample(optimized(same), 8, x))


def test_another_resolution_begins_a_run() -> None:
    class Any2D(PlainDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.grid = (x.shape[2] // 2, x.shape[3] // 2)
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            c = self.time(t[:, None].float().expand(-1, 16) / 1000) + self.labels(y)
            for block in self.blocks:
                tokens = block(tokens, c)
            return self.finish(tokens, c)

    model = randomize(Any2D())
    opt = optimized(model)
    small = sample(opt, 3, noise(size=(8, 8)))
    large = sample(opt, 8, noise(size=(12, 8)))
    assert kinds(opt) == "fpppfppp"
    assert small.shape != large.shape
    assert torch.equal(large, sample(optimized(model), 8, noise(size=(12, 8))))


def test_two_contexts_interleaved_are_two_runs(traced: Traced) -> None:
    opt, other = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    xs, ys = [noise(), noise(seed=3)], [torch.arange(2), torch.full((2,), 10)]
    alone = []
    for x, y in zip(xs, ys, strict=True):
        other.reset()  # rows of modulations that are made at once, as for other labels, are rounded otherwise
        alone.append(sample(other, 8, x, y))
    with torch.no_grad():
        for i in range(8):
            t = torch.full((2,), (7 - i) * 1000 // 8)
            for j, name in enumerate(("cond", "uncond")):
                with opt.cache_context(name):
                    xs[j] = xs[j] - opt(xs[j], t, ys[j]) / 8
    for together, apart in zip(xs, alone, strict=True):
        assert torch.equal(together, apart)
    assert len(opt.steps) == 16


def test_an_exception_voids_the_run(model: PlainDiT) -> None:
    opt = optimized(model)
    clean = sample(opt, 8, noise())
    opt.reset()
    partial_run(opt, 2)
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError, torch._dynamo.exc.TorchDynamoException)):
        opt(torch.randn(2, 5, 8, 8), torch.zeros(2), torch.arange(2))
    # The failed call carried no timestep of its own, so only the exception can have ended the run.
    with torch.no_grad():
        opt(noise(), torch.full((2,), 600), torch.arange(2))
    assert kinds(opt) == "f"
    opt.reset()
    assert torch.equal(sample(opt, 8, noise()), clean)


def test_an_exception_inside_a_compiled_step_voids_the_run(model: PlainDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized(model)
    partial_run(opt, 2)
    execute = Executor._execute

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Executor, "_execute", fail)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        opt(noise(), torch.full((2,), 700), torch.arange(2))
    monkeypatch.setattr(Executor, "_execute", execute)
    with torch.no_grad():
        opt(noise(), torch.full((2,), 600), torch.arange(2))
    assert kinds(opt) == "f"


class BrokenLoop(PlainDiT):
    """A graph break inside the loop over blocks: Dynamo then compiles one block and calls it for each."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.prepare(x, t, y)
        for block in self.blocks:
            tokens = block(tokens, c)
            torch._dynamo.graph_break()
        return self.finish(tokens, c)


class BrokenHalf(PlainDiT):
    """A graph break between two halves: two graphs."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.prepare(x, t, y)
        tokens = self.blocks[1](self.blocks[0](tokens, c), c)
        torch._dynamo.graph_break()
        tokens = self.blocks[3](self.blocks[2](tokens, c), c)
        return self.finish(tokens, c)


@pytest.mark.parametrize("entry", ["optimize", "backend"])
@pytest.mark.parametrize("style", [BrokenLoop, BrokenHalf])
def test_graph_breaks_leave_fragments_that_share_the_step(traced: Traced, style: type[PlainDiT], entry: str) -> None:
    model = randomize(style(depth=4))
    policy = ToCa(num_steps=8, interval=4, fresh_ratio=0.3, schedule="constant", bonus=0.0)
    if entry == "optimize":
        opt = optimized(model, policy)
    else:
        opt = torch.compile(model, backend="toca", options={"policy": policy, "lowering": "eager"})
    expected = sample(traced(PlainDiT, policy, depth=4)[1], 8, noise())
    torch.testing.assert_close(sample(opt, 8, noise()), expected)
    torch.testing.assert_close(sample(opt, 8, noise()), expected)
    assert len(toca_compile.explain(opt).plans) == (1 if style is BrokenLoop else 2)


def test_torch_compile_is_the_same_machinery(model: PlainDiT, traced: Traced) -> None:
    expected = sample(traced(PlainDiT, POLICY)[1], 8, noise())
    opt = torch.compile(model, backend="toca", options={"policy": POLICY, "lowering": "eager"}, fullgraph=True)
    assert torch.equal(sample(opt, 8, noise()), expected)
    assert torch.equal(sample(opt, 8, noise()), expected)
    assert toca_compile.explain(opt).schedule == "FPPPFPPP"


def test_two_models_of_one_class_do_not_share_runs() -> None:
    """torch may reuse one compiled function for both; their caches and steps stay apart."""
    models = [randomize(PlainDiT(), seed) for seed in (0, 1)]
    options = {"policy": POLICY, "lowering": "eager"}
    expected = [sample(optimized(m), 8, noise()) for m in models]
    opts = [torch.compile(m, backend="toca", options=options) for m in models]
    for _ in range(2):
        for opt, wanted in zip(opts, expected, strict=True):
            assert torch.equal(sample(opt, 8, noise()), wanted)


def test_no_recompile_in_the_loop_nor_with_another_policy(model: PlainDiT) -> None:
    from torch._dynamo.utils import counters

    opt = optimized(model, toca_compile.preset("dit-xl-2/ddim-50"))
    counters.clear()
    sample(opt, 50, noise())
    assert not counters["graph_break"]
    opt.policy = toca_compile.preset("dit-xl-2/ddim-50", fresh_ratio=0.2)
    sample(opt, 50, noise())
    assert toca_compile.summary(opt).recompiles == 0
    assert counters["stats"]["unique_graphs"] <= 1  # none where a model like it was traced before


def test_no_value_is_read_on_the_host(model: PlainDiT) -> None:
    """On meta tensors there is no value to read: a loop that asked for one would fail."""
    with torch.device("meta"):
        ghost = PlainDiT().eval()
    opt = optimized(ghost, toca_compile.preset("dit-xl-2/ddim-50", fresh_ratio=0.3))
    x = torch.empty(2, 2, 8, 8, device="meta")
    with torch.no_grad():
        for _ in range(50):
            out = opt(x, torch.empty(2, device="meta"), torch.empty(2, dtype=torch.long, device="meta"))
    assert out.shape == x.shape
    assert "p" in kinds(opt)


def test_the_object_behaves_as_the_module(model: PlainDiT) -> None:
    opt = optimized(model)
    assert opt.grid == model.grid
    assert list(opt.state_dict()) == list(model.state_dict())
    assert [n for n, _ in opt.named_children()]
    opt.load_state_dict(model.state_dict())
    assert opt.to(torch.float64) is opt
    assert next(model.parameters()).dtype is torch.float64
    assert not opt.training


def test_the_backend_takes_other_batches_and_python_numbers(traced: Traced) -> None:
    """Dynamo hands over symbolic sizes at the second shape; each shape is a graph and a run of its own."""
    model = randomize(PlainDiT())
    opt = torch.compile(model, backend="toca", options={"policy": POLICY, "lowering": "eager"})
    for batch in (2, 3, 4, 2):
        expected = sample(traced(PlainDiT, POLICY)[1], 8, noise(batch))
        torch.testing.assert_close(sample(opt, 8, noise(batch)), expected)


class Scalar(PlainDiT):
    """Takes its timestep as a Python number."""

    def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.full((x.shape[0],), t), y)


def test_a_changing_python_number_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    opt = optimized(randomize(Scalar()))
    with torch.no_grad():
        for i in range(4):
            opt(noise(), 900.0 - i, torch.arange(2))
    assert len([r for r in caplog.records if "pass it as a tensor" in r.message]) == 1


def test_under_autocast() -> None:
    model = randomize(PlainDiT())
    opt = optimized(model, FullCompute())
    x, t, y = noise(), torch.full((2,), 500), torch.arange(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(opt(x, t, y), model(x, t, y))
    opt = optimized(model)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = sample(opt, 8, x), sample(opt, 8, x)
    assert torch.equal(first, second)
    assert kinds(opt) == "fpppfppp"
