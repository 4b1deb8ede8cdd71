"""No cache survives into a run it does not belong to: abandoned samplings, passes, threads, changed weights, leaks.

Every test compares with a sampling by an object that has no past."""

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, Texted, randomize
from tests.pipelines import build, run
from tests.runs import POLICY, STEPS, TIMES, called, kinds, optimized, steps
from tests.sampling import noise
from tests.shared import Traced
from toca_compile import Fora, FullCompute


class Linear(PlainDiT):
    """A time embedding without a sine, for timesteps of shape [B] and [B, 1]."""

    def prepare(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return tokens, self.time(t.reshape(-1, 1).float().expand(-1, 16) / 1000) + self.labels(y)


class Looked(PlainDiT):
    """Learned embeddings of whole timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 16)

    def prepare(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return tokens, self.table(t) + self.labels(y)


class Column(PlainDiT):
    """Takes [B, 1]."""

    def prepare(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().prepare(x, t[:, 0], y)


@pytest.mark.parametrize("entry", ["optimize", "backend"])
@pytest.mark.parametrize("style", [PlainDiT, Linear, Looked, Column])
def test_an_abandoned_sampling_leaves_nothing(traced: Traced, style: type[PlainDiT], entry: str) -> None:
    settings = {"depth": 1} if style is not Looked else {}
    model = randomize(style(**settings))
    shape = (2, 1) if style is Column else (2,)
    opt = optimized(model)
    if entry == "backend":
        opt = torch.compile(model, backend="toca", options={"policy": POLICY, "lowering": "eager"})
    clean = steps(traced(style, POLICY, **settings)[1], noise(), TIMES, shape=shape)
    for calls in (1, 2, 3, 7):
        steps(opt, noise(seed=5), TIMES[:calls], shape=shape)
        assert torch.equal(steps(opt, noise(), TIMES, shape=shape), clean), calls
        assert entry == "backend" or [r.index for r in opt.steps] == list(range(STEPS)), calls


def test_another_strength_is_another_sampling(traced: Traced) -> None:
    opt, other = (traced(PlainDiT, POLICY, which=i)[1] for i in range(2))
    for before, times in (
        (TIMES[:6], TIMES[3:]), (TIMES[:2], TIMES[2:]), (TIMES[:2], TIMES[5:]), (TIMES[:5], TIMES[4:]), (TIMES[:4], TIMES[1:]),
    ):  # fmt: skip
        other.reset()
        clean = steps(other, noise(), times)
        opt.reset()
        steps(opt, noise(seed=5), before)
        assert torch.equal(steps(opt, noise(), times), clean), (before, times)


def test_what_is_told_decides_first(traced: Traced) -> None:
    """The same timesteps, but the caller says that they are steps 0, 1, … of a new sampling, or of the old one."""
    (model, opt), (_, other) = (traced(PlainDiT, POLICY, which=i) for i in range(2))

    def told(times: list[int], start: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            for i, t in enumerate(times, start):
                with opt.cache_context("main", step_index=i, num_inference_steps=STEPS):
                    x = x - opt(x, torch.full((2,), t), torch.arange(2)) / STEPS
        return x

    clean = steps(other, noise(), TIMES[2:])
    told(TIMES[:2], 0, noise())  # the very latents that would go on
    assert torch.equal(told(TIMES[2:], 0, steps(model, noise(), [])), clean)
    opt.reset()
    told([875, 100, 900, 20], 0, noise())  # no clock runs like this, but told is told
    assert [r.index for r in opt.steps] == [0, 1, 2, 3]


def test_a_second_order_sampler_asks_twice_at_one_time(traced: Traced) -> None:
    def heun(net: Any, x: Tensor) -> Tensor:
        y = torch.arange(2)
        with torch.no_grad():
            for i in range(4):
                t, s = torch.full((2,), 900 - 200 * i), torch.full((2,), 700 - 200 * i)
                slope = net(x, t, y)
                x = x - (slope + net(x - slope / 16, s, y)) / 32
        return x

    _, opt = traced(PlainDiT, POLICY)
    first = heun(opt, noise())
    assert [r.index for r in opt.steps] == list(range(8))
    assert torch.equal(heun(opt, noise()), first)


def test_a_clock_that_the_host_cannot_see_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        ghost = PlainDiT().eval()
    opt = optimized(ghost)
    x = torch.empty(2, 2, 8, 8, device="meta")
    with torch.no_grad():
        for _ in range(6):
            opt(x, torch.empty(2, device="meta"), torch.empty(2, dtype=torch.long, device="meta"))
    assert len([r for r in caplog.records if "call reset()" in r.message]) == 1
    assert "reset()" in str(toca_compile.explain(opt))
    assert "reset()" not in str(toca_compile.explain(called(optimized(randomize(PlainDiT())))))


class Featured(PlainDiT):
    """The time comes as features: no small input tells it. A guidance scale that never changes must not be taken for
    it."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, scale: float = 3.5, height: int = 8) -> Tensor:
        h, _ = self.prepare(x, torch.zeros(x.shape[0]), y)
        c = self.time(t) * scale + self.labels(y)
        for block in self.blocks:
            h = block(h, c)
        return self.finish(h, c)


def test_without_a_visible_time_steps_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    opt, x = optimized(randomize(Featured())), noise()
    with torch.no_grad():
        for _ in range(2):
            for t in TIMES:
                x = x - opt(x, torch.full((2, 16), t / 1000), torch.arange(2), scale=2.0, height=8) / STEPS
            assert kinds(opt) == "fpppfppp"
    assert len([r for r in caplog.records if "call reset()" in r.message]) == 1


def test_a_label_is_not_taken_for_the_time_for_long() -> None:
    opt, x = optimized(randomize(Featured())), noise(1)
    with torch.no_grad():
        for i in range(2 * STEPS + 3):
            x = x - opt(x, (1 - i / 20) * torch.linspace(0, 1, 16)[None], torch.zeros(1, dtype=torch.long)) / STEPS
    assert kinds(opt) == "fpppfppp"


def test_without_a_visible_time_turns_are_said(caplog: pytest.LogCaptureFixture) -> None:
    opt, x = optimized(randomize(Featured()), Fora(STEPS, 4)), noise()
    with torch.no_grad():
        for i, t in enumerate(TIMES):
            given = _strided(x) if i % 2 else x
            x = (x - opt(given, torch.full((2, 16), t / 1000), torch.arange(2)) / STEPS).contiguous()
    assert kinds(opt) == "f" * STEPS  # for all that is known, each may be of another sampling
    assert len([r for r in caplog.records if "take turns" in r.message]) == 1


# -- passes, contexts, threads -----------------------------------------------------------------------------------------


def guided(net: Any, x: Tensor, around: Callable[[str], Any] = lambda _: contextlib.nullcontext()) -> Tensor:
    with torch.no_grad():
        for t in TIMES:
            t_ = torch.full((2,), t)
            with around("cond"):
                cond = net(x, t_, torch.arange(2))
            with around("uncond"):
                uncond = net(x, t_, torch.full((2,), 10))
            x = x - (uncond + 2 * (cond - uncond)) / STEPS
    return x


@pytest.mark.parametrize("style", [PlainDiT, Linear, Looked])
def test_two_passes_a_step_without_a_context_are_two_runs(traced: Traced, style: type[PlainDiT]) -> None:
    model, named = randomize(style()), traced(style, POLICY)[1]
    expected = guided(named, noise(), named.cache_context)
    opt = optimized(model)
    for _ in range(2):
        assert torch.equal(guided(opt, noise()), expected)
        assert len(opt.steps) == 2 * STEPS
        assert [r.index for r in opt.steps] == [i for i in range(STEPS) for _ in range(2)]  # in order of time
    bare = torch.compile(model, backend="toca", options={"policy": POLICY, "lowering": "eager"})
    assert torch.equal(guided(bare, noise()), expected)


@pytest.mark.parametrize(
    "orders",
    [
        ["cu", "uc"] * 4,
        ["cu"] * 3 + ["c"] * 5,
        ["cu"] * 3 + ["u"] * 5,
        ["cun", "nuc", "ucn", "cnu"] * 2,
        ["cu", "uc"] + ["ucn"] * 6,
    ],
)
def test_passes_are_known_by_their_texts_in_any_order(traced: Traced, orders: list[str]) -> None:
    texts = {name: torch.randn(2, 5, 8) for name in "cun"}
    opt = traced(Texted, Fora(STEPS, 4))[1]
    named, bare = dict[Any, Tensor](), dict[Any, Tensor]()
    arounds: Any = opt.cache_context, lambda _: contextlib.nullcontext()
    for found, around in zip((named, bare), arounds, strict=True):
        opt.reset()
        with torch.no_grad():
            for i, (t, order) in enumerate(zip(TIMES, orders, strict=True)):
                for name in order:
                    with around(name):
                        found[i, name] = opt(noise(seed=i), torch.full((2,), t), texts[name])
    assert all(torch.equal(named[key], bare[key]) for key in named)


def test_two_pictures_in_turns_without_a_context_are_two_runs(traced: Traced) -> None:
    model, (_, other) = randomize(PlainDiT()), traced(PlainDiT, POLICY)
    expected = [steps(other, noise(seed=s), TIMES) for s in (0, 5)]
    for net in (
        optimized(model),
        torch.compile(model, backend="toca", options={"policy": POLICY, "lowering": "eager"}),
    ):
        for _ in range(2):
            xs = [noise(seed=0), noise(seed=5)]
            for t in TIMES:
                xs = [steps(net, x, [t]) for x in xs]
            for x, wanted in zip(xs, expected, strict=True):
                assert torch.equal(x, wanted)


def test_records_are_of_the_last_sampling(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    guided(opt, noise())
    assert len(opt.steps) == 2 * STEPS
    steps(opt, noise(), TIMES)
    assert len(opt.steps) == STEPS


def test_records_are_of_the_last_pipeline_call() -> None:
    pipe, call = build("FluxPipeline")
    toca_compile.optimize(pipe, Fora(5, 2), lowering="eager")
    unwanted = {f"negative_{n}": -call[n] for n in ("prompt_embeds", "pooled_prompt_embeds")}
    pipe(**call, **unwanted, true_cfg_scale=2.0, num_inference_steps=5)
    assert [r.index for r in pipe.transformer.steps] == [i for i in range(5) for _ in range(2)]
    pipe(**call, num_inference_steps=5)
    assert [r.index for r in pipe.transformer.steps] == list(range(5))


def test_a_context_can_be_reset_alone(traced: Traced) -> None:
    _, opt = traced(PlainDiT, POLICY)
    with torch.no_grad():
        for t in TIMES[:3]:
            for name in ("a", "b"):
                with opt.cache_context(name):
                    opt(noise(), torch.full((2,), t), torch.arange(2))
    both = opt.cache_bytes
    opt.reset(context="a")
    assert 0 < opt.cache_bytes < both
    opt.reset()
    assert opt.cache_bytes == 0


def _in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        barrier.wait()
        try:
            results[i] = jobs[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("context", ["own", "same", None])
def test_threads_have_runs_of_their_own(context: str | None) -> None:
    # Which rows of modulations are made at once depends on which thread comes first, and so does their rounding.
    other = optimized(randomize(PlainDiT()), hoist=False)
    expected = [steps(other, noise(seed=s), TIMES, torch.full((2,), s)) for s in range(3)]
    opt = optimized(randomize(PlainDiT()), hoist=False)  # traced in threads

    def job(s: int) -> Tensor:
        x = noise(seed=s)
        for t in TIMES:
            name = f"c{s}" if context == "own" else context
            with opt.cache_context(name) if name else contextlib.nullcontext():
                x = steps(opt, x, [t], torch.full((2,), s))
        return x

    for result, wanted in zip(_in_threads([lambda s=s: job(s) for s in range(3)]), expected, strict=True):
        assert isinstance(result, Tensor), result
        assert torch.equal(result, wanted)


def test_pipelines_of_several_lengths_share_a_model_in_threads() -> None:
    """Each thread's pictures are those of its pipeline alone, whatever plan the others follow meanwhile."""
    pipe, call = build("PixArtSigmaPipeline")
    toca_compile.optimize(pipe, Fora(4, 2), lowering="eager")
    lengths = (3, 5, 8)
    expected = [run(pipe, call, n) for n in lengths]
    pipes = [type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}) for _ in lengths]
    for other in pipes:
        other.set_progress_bar_config(disable=True)
    for _ in range(2):
        results = _in_threads([lambda p=p, n=n: run(p, call, n) for p, n in zip(pipes, lengths, strict=True)])
        for result, wanted in zip(results, expected, strict=True):
            assert isinstance(result, Tensor), result
            assert torch.equal(result, wanted)


def test_tasks_have_runs_of_their_own(traced: Traced) -> None:
    import asyncio

    _, other = traced(PlainDiT, POLICY)
    expected = [steps(other, noise(seed=s), TIMES) for s in range(2)]
    opt = optimized(randomize(PlainDiT()))

    async def job(s: int) -> Tensor:
        x = noise(seed=s)
        for t in TIMES:
            with opt.cache_context("main"):
                x = await asyncio.to_thread(steps, opt, x, [t])  # in whatever thread
            await asyncio.sleep(0)
        return x

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(job(0), job(1)))

    for result, wanted in zip(asyncio.run(both()), expected, strict=True):
        assert torch.equal(result, wanted)


def test_the_fast_path_of_attention_comes_back() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    models = [optimized(randomize(PlainDiT(depth=1)), FullCompute()) for _ in range(2)]
    results = _in_threads([lambda m=m: steps(m, noise(), TIMES[:3]) for m in models])
    assert all(isinstance(r, Tensor) for r in results), results
    assert torch.backends.mha.get_fastpath_enabled()


# -- signatures --------------------------------------------------------------------------------------------------------


def _strided(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("what", ["strides", "modes"])
def test_signatures_that_take_turns_keep_a_run_each(what: str) -> None:
    model = randomize(PlainDiT())
    opt = optimized(model, Fora(STEPS, 4))
    x, y = noise(), torch.arange(2)
    with torch.no_grad():
        for i, t in enumerate(TIMES):
            mode = torch.inference_mode() if what == "modes" and i % 2 else contextlib.nullcontext()
            with mode:
                out = opt(_strided(x) if what == "strides" and i % 2 else x, torch.full((2,), t), y)
            x = (x - out.clone() / STEPS).contiguous()
    assert [r.index for r in opt.steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert kinds(opt) == "ffrrrrrr"


def test_texts_of_two_lengths_take_turns() -> None:
    model = randomize(Texted())
    opt, alone = optimized(model, Fora(STEPS, 4)), optimized(model, Fora(STEPS, 4))
    texts = [torch.randn(2, n, 8) for n in (3, 5)]

    def passes(net: Any, x: Tensor, around: Any) -> Tensor:
        with torch.no_grad():
            for t in TIMES:
                outs = []
                for i, text in enumerate(texts):
                    with around(str(i)):
                        outs.append(net(x, torch.full((2,), t), text))
                x = x - (outs[0] + outs[1]) / 2 / STEPS
        return x

    expected = passes(alone, noise(), alone.cache_context)
    assert torch.equal(passes(opt, noise(), lambda _: contextlib.nullcontext()), expected)
    assert kinds(opt) == "ff" + "rr" * 3 + "ff" + "rr" * 3


def test_a_hook_added_after_the_first_call_runs() -> None:
    model: Any = randomize(PlainDiT())
    opt = optimized(model, FullCompute())
    x = noise()
    steps(opt, x, TIMES[:1])
    for module in (model.blocks[1].mlp, model):
        handle = module.register_forward_hook(lambda m, i, out: out * 2)
        torch.testing.assert_close(steps(opt, x, TIMES[:1]), steps(model, x, TIMES[:1]))
        handle.remove()
        torch.testing.assert_close(steps(opt, x, TIMES[:1]), steps(model, x, TIMES[:1]))


def test_kinds_are_those_of_all_graphs_of_a_step(traced: Traced) -> None:
    class Halves(PlainDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            h, c = self.prepare(x, t, y)
            h = self.blocks[0](h, c)
            torch._dynamo.graph_break()
            return self.finish(self.blocks[1](h, c), c)

    opt = optimized(randomize(Halves()))
    steps(opt, noise(), TIMES)
    _, whole = traced(PlainDiT, POLICY)
    steps(whole, noise(), TIMES)
    assert kinds(opt) == kinds(whole) == "fpppfppp"
    assert opt.steps[1].k.keys() == whole.steps[1].k.keys()


def test_autocast_loses_no_record() -> None:
    opt = optimized(randomize(PlainDiT()))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            steps(opt, noise(), TIMES)
        assert [r.index for r in opt.steps] == list(range(STEPS))
    steps(opt, noise(), TIMES)
    assert kinds(opt) == "fpppfppp"
