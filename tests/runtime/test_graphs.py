"""Steps as graphs: whole samplings on a recorder, which replays ops and never the Python that called them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, Texted, randomize
from tests.pipelines import build, run
from tests.recorder import GraphError, Recorder
from tests.runs import TIMES, kinds, optimized, steps
from tests.runtime.test_carry_over import CACHING, Cast, called, given
from tests.sampling import gaussian, noise, sample
from tests.shared import Traced
from toca_compile import BlockCache, ClusCa, Composition, DuCa, Fora, TaylorSeer, TaylorToCa, ToCa, backend
from toca_compile.compiler.buckets import BUCKETS, GRAPHS, bucketed
from toca_compile.ir.plan import Plan
from toca_compile.ir.selectors import Selector
from toca_compile.ir.types import Site
from toca_compile.policies import Every, Partial, Queries, Rule, Share
from toca_compile.policies.anchors import Anchors, Dmd, Hermite
from toca_compile.runtime import graphs
from toca_compile.session import Session

GRAPHED: dict[str, Any] = {"mode": "reduce-overhead"}


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Those of the models that are optimised from now on."""
    made: list[Recorder] = []

    def make(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setitem(graphs.CAPTURES, "cpu", make)
    return made


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is said: nothing ran without a graph."""
    yield
    assert not [r.message for r in caplog.records if r.levelno >= logging.WARNING]


@dataclass(frozen=True)
class Rounded:
    """A policy with as few different numbers of tokens as graphs have."""

    policy: Any

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        return bucketed(self.policy.plan(sites), sites)


def same_runs(plain: Any, opt: Any, policy: Any, recorders: list[Recorder], name: str = "") -> None:
    """Samplings with graphs and without are equal to the last bit; in the third, all is replayed."""
    plain.policy, opt.policy = Rounded(policy), policy
    for recorder in recorders:
        recorder.warm, recorder.graphs = 0, []
    for seed in range(3):
        x = noise(size=(2 * plain.grid[0], 2 * plain.grid[1]), seed=seed)
        wanted = sample(plain, policy.num_steps, x)
        before = sum(g.replays for r in recorders for g in r.graphs)
        assert torch.equal(sample(opt, policy.num_steps, x), wanted), name
        assert kinds(opt) == kinds(plain), name
        assert [r.k for r in opt.steps] == [r.k for r in plain.steps], name
    (recorder,) = recorders
    assert sum(g.replays for g in recorder.graphs) - before == policy.num_steps, name
    assert recorder.warm == len(recorder.graphs) == toca_compile.explain(opt).cuda_graphs > 0, name


POLICIES: dict[str, Any] = {
    "reuse": Fora(7, 3),
    "some tokens, by attention": ToCa(9, interval=4, fresh_ratio=0.3),
    "some tokens, at random": ToCa(9, interval=4, fresh_ratio=0.3, score="random"),
    "turns": DuCa(8, 3),
    "series": TaylorSeer(10, 3, 2),
    "Newton's": TaylorSeer(10, 3, 2, basis="newton"),
    "anchors": Composition(9, Every(3), (Rule(do=Anchors(Hermite())),)),
    "measured anchors": Composition(9, Every(2), (Rule(do=Anchors(Dmd())),)),
    "blocks": BlockCache(9, first=1, interval=3, order=1),
    "all blocks": BlockCache(9, first=0, interval=3, order=2, basis="newton"),
    "queries": Composition(7, Every(3), (Rule(do=Queries(keys="update")),), how_many=Share(0.3)),
    "a forecast of each token": Composition(8, Every(4), (Rule(do=Partial(order=1)),), how_many=Share(0.3)),
    "beside a forecast": TaylorToCa(8, 4, 2, 0.3, keys="fresh", update=False),
    "clusters": ClusCa(9, 4, clusters=5),
    "bfloat16": TaylorSeer(8, 3, 1, cache_dtype="bfloat16"),
}


@pytest.mark.usefixtures("quiet")
def test_runs_are_the_same(traced: Traced, recorders: list[Recorder]) -> None:
    model = randomize(PlainDiT(depth=2))
    (_, plain), opt = traced(PlainDiT, depth=2), optimized(model, **GRAPHED)
    for name, policy in POLICIES.items():
        same_runs(plain, opt, policy, recorders, name)


@pytest.mark.usefixtures("quiet")
def test_a_run_needs_few_graphs(recorders: list[Recorder]) -> None:
    policy = ToCa(50, fresh_ratio=0.3)
    model = randomize(PlainDiT((16, 16), depth=2))
    opt = optimized(model, policy, **GRAPHED)
    same_runs(optimized(model), opt, policy, recorders)
    assert len(recorders[0].graphs) == GRAPHS
    plan = toca_compile.explain(opt).plan
    sites = toca_compile.explain(opt).program.sites
    asked = policy.plan(sites)
    more = 0
    for new, old in zip(plan.steps, asked.steps, strict=True):
        for site, a, b in zip(sites, new.sites, old.sites, strict=True):
            assert a.computed(site) >= b.computed(site)
            assert a.form() == b.form()
            more += a.computed(site) - b.computed(site)
    assert 0 < more < 0.05 * sum(a.computed(s) for step in asked.steps for a, s in zip(step.sites, sites, strict=True))
    assert BUCKETS >= len({step.sites for step in plan.steps if step.kind.value == "partial"})
    counted = [sum(r.k.values()) for r in opt.steps]
    assert counted == [sum(a.computed(s) for a, s in zip(step.sites, sites, strict=True)) for step in plan.steps]


def test_numbers_are_rounded_for_graphs_alone() -> None:
    policy = ToCa(50, fresh_ratio=0.3)
    opt = optimized(randomize(PlainDiT((16, 16), depth=1)), policy, **GRAPHED)
    steps(opt, noise(size=(16, 16)), TIMES[:1])
    report = toca_compile.explain(opt)
    plan = policy.plan(report.program.sites)
    assert report.plan == plan != bucketed(plan, report.program.sites)


@pytest.mark.usefixtures("quiet")
def test_text_is_copied_where_it_is_read(recorders: list[Recorder]) -> None:
    """Keys and values of a text are made once a run; each run has another text."""
    net = randomize(Texted())
    policy = TaylorSeer(6, 3, 1)
    plain, opt = optimized(net, policy), optimized(net, policy, **GRAPHED)
    for seed in range(4):
        text = gaussian(2, 5, 8, seed=seed)
        runs = []
        for way in (plain, opt):
            x = noise(seed=seed)
            with torch.no_grad():
                for t in TIMES[:6]:
                    x = x - way(x, torch.full((2,), t), text)[:, :2] / 6
            runs.append(x)
        assert torch.equal(*runs)
    assert recorders[0].graphs


@pytest.mark.usefixtures("quiet")
def test_contexts_have_graphs_of_their_own(traced: Traced, recorders: list[Recorder]) -> None:
    model = randomize(PlainDiT(depth=2))
    (_, plain), opt = traced(PlainDiT, POLICIES["series"], depth=2), optimized(model, POLICIES["series"], **GRAPHED)

    def sampled(way: Any, seed: int) -> list[Tensor]:
        xs = {"cond": noise(seed=seed), "uncond": noise(seed=seed + 9)}
        with torch.no_grad():
            for i in range(10):
                for name, x in xs.items():
                    with way.cache_context(name):
                        xs[name] = x - way(x, torch.full((2,), 900 - 90 * i), torch.arange(2))[:, :2] / 10
        return [*xs.values()]

    counts = []
    for seed in range(3):
        assert all(map(torch.equal, sampled(plain, seed), sampled(opt, seed)))
        counts.append(len(recorders[0].graphs))
    assert counts[1] == counts[2]
    alone = optimized(model, POLICIES["series"], **GRAPHED)
    for seed in range(3):
        sample(alone, 10, noise(seed=seed))
    assert counts[2] == 2 * len(recorders[1].graphs)


@pytest.mark.usefixtures("quiet")
def test_guided_and_unguided_runs_in_turn(traced: Traced, recorders: list[Recorder]) -> None:
    """Batches of two sizes are two graphs of the model, which keep what was recorded."""
    model = randomize(PlainDiT(depth=2))
    policy = POLICIES["some tokens, by attention"]
    (_, plain), opt = traced(PlainDiT, policy, depth=2), optimized(model, policy, **GRAPHED)
    counts = []
    for seed in range(3):
        for batch in (2, 1):
            wanted = sample(plain, policy.num_steps, noise(batch, seed=seed))
            assert torch.equal(sample(opt, policy.num_steps, noise(batch, seed=seed)), wanted)
        counts.append(len(recorders[0].graphs))
    assert counts[1] == counts[2]


@pytest.mark.usefixtures("quiet")
def test_what_reset_and_another_policy_void(traced: Traced, recorders: list[Recorder]) -> None:
    model = randomize(PlainDiT(depth=2))
    (_, plain), opt = traced(PlainDiT, Fora(4, 2), depth=2), optimized(model, Fora(4, 2), **GRAPHED)
    policies: list[Any] = [Fora(4, 2), TaylorSeer(6, 3, 1, cache_dtype="bfloat16"), TaylorSeer(6, 3, 1)]
    for policy in policies:
        plain.policy = opt.policy = policy
        assert not toca_compile.explain(opt).cuda_graphs
        for seed in range(3):
            wanted = sample(plain, policy.num_steps, noise(seed=seed))
            assert torch.equal(sample(opt, policy.num_steps, noise(seed=seed)), wanted)
        assert toca_compile.explain(opt).cuda_graphs
        assert opt.cache_bytes > plain.cache_bytes == 0  # the memory stays
    opt.reset()
    assert opt.cache_bytes == 0
    plain.policy = opt.policy = POLICIES["series"]
    steps(opt, noise(), TIMES[:3])  # abandoned in the middle
    opt.reset()
    assert torch.equal(sample(opt, 10, noise()), sample(plain, 10, noise()))


@pytest.mark.usefixtures("quiet")
def test_an_abandoned_run_leaves_nothing(traced: Traced, recorders: list[Recorder]) -> None:
    """The next run has its memory."""
    model = randomize(PlainDiT(depth=2))
    (_, plain), opt = traced(PlainDiT, POLICIES["series"], depth=2), optimized(model, POLICIES["series"], **GRAPHED)
    held = []
    for seed in range(3):
        for way in (plain, opt):
            steps(way, noise(seed=seed + 7), [999, 888, 777, 666])
        assert torch.equal(sample(opt, 10, noise(seed=seed)), sample(plain, 10, noise(seed=seed)))
        held.append(opt.cache_bytes)
    assert held[1] == held[2]


def _in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(1.25)


_EARLIER: list[Tensor] = []  # alive, so that no address comes again: the recorder would say that the memory is gone


def _elsewhere(p: nn.Parameter) -> None:
    _EARLIER.append(p.data)
    p.data = p.data * 1.25


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("way", [_in_place, _elsewhere])
def test_new_weights_are_used(way: Callable[[nn.Parameter], None], recorders: list[Recorder]) -> None:
    """Those that are written into the same memory are read there; those that lie elsewhere are recorded anew."""
    model: Any = randomize(PlainDiT(depth=2))
    plain, opt = optimized(model, Fora(5, 2)), optimized(model, Fora(5, 2), **GRAPHED)
    counts = []
    for seed in range(6):
        assert torch.equal(sample(opt, 5, noise(seed=seed)), sample(plain, 5, noise(seed=seed)))
        counts.append(len(recorders[0].graphs))
        if seed % 2:
            way(model.blocks[1].mlp[0].weight)
            way(model.blocks[0].qkv.bias)
    recorded = counts[-1] - counts[1]
    assert (recorded == 0) == (way is _in_place)
    assert toca_compile.explain(opt).cuda_graphs == 2


def test_weights_that_move_at_each_call_are_said(recorders: list[Recorder], caplog: pytest.LogCaptureFixture) -> None:
    model: Any = randomize(PlainDiT(depth=1))
    plain, opt = optimized(model, Fora(5, 2)), optimized(model, Fora(5, 2), **GRAPHED)
    for seed in range(6):
        xs = [noise(seed=seed)] * 2
        for t in TIMES[:5]:
            _elsewhere(model.head.weight)
            xs = [steps(way, x, [t]) for way, x in zip((plain, opt), xs, strict=True)]
            assert torch.equal(*xs)
    (said,) = (r.message for r in caplog.records)
    assert said == (
        "mode='reduce-overhead' runs without CUDA graphs: the weights lie somewhere else at each call, as where they "
        "are offloaded"
    )
    assert said in " ".join(str(toca_compile.explain(opt)).split())


@pytest.mark.usefixtures("quiet")
def test_inputs_may_lie_anywhere(traced: Traced, recorders: list[Recorder]) -> None:
    """The same strides, another memory: slices, values that were expanded, inference tensors."""
    model = randomize(PlainDiT(depth=1))
    (_, plain), opt = traced(PlainDiT, Fora(6, 2), depth=1), optimized(model, Fora(6, 2), **GRAPHED)
    made: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch.stack([x, x + 1], -1)[..., 0],
        lambda x: x[:1].expand(2, -1, -1, -1),
    ]
    for make in made:
        for seed in range(3):
            runs = []
            for way in (plain, opt):
                x, outs = noise(seed=seed), []
                with torch.inference_mode():
                    for t in TIMES[:6]:
                        outs.append(way(make(x), torch.full((2,), t), torch.arange(2)))
                        x = x - outs[-1][:, :2] / 6
                runs.append(outs)
            assert all(map(torch.equal, *runs))
            assert all(a.stride() == b.stride() for a, b in zip(*runs, strict=True))
            assert all(out.is_inference() for out in runs[1])
    assert recorders[0].graphs


@pytest.mark.usefixtures("quiet")
def test_what_is_handed_out_stays(recorders: list[Recorder]) -> None:
    opt = optimized(randomize(PlainDiT(depth=1)), Fora(4, 2), **GRAPHED)
    for _ in range(2):
        sample(opt, 4, noise())
    with torch.no_grad():
        outs = [opt(noise(seed=i), torch.full((2,), t), torch.arange(2)) for i, t in enumerate(TIMES[:4])]
        kept = [out.clone() for out in outs]
    sample(opt, 4, noise(seed=5))
    assert all(map(torch.equal, outs, kept))


def test_a_threshold_is_said(recorders: list[Recorder], caplog: pytest.LogCaptureFixture) -> None:
    model, policy = randomize(PlainDiT(depth=2)), BlockCache(6, first=1, threshold=0.3)
    plain, opt = optimized(model, policy), optimized(model, policy, **GRAPHED)
    for seed in range(2):
        assert torch.equal(sample(opt, 6, noise(seed=seed)), sample(plain, 6, noise(seed=seed)))
        assert kinds(opt) == kinds(plain)
    (said,) = (r.message for r in caplog.records)
    assert said == (
        "mode='reduce-overhead' runs without CUDA graphs: the policy decides at each step, by a threshold, whether "
        "blocks are computed"
    )
    assert not recorders[0].graphs
    opt.policy = plain.policy = Fora(4, 2)
    for _ in range(2):
        assert torch.equal(sample(opt, 4, noise()), sample(plain, 4, noise()))
    assert recorders[0].graphs  # another policy may be one that graphs can hold


@pytest.mark.usefixtures("quiet")
def test_calls_of_a_pipeline(recorders: list[Recorder]) -> None:
    """Of two lengths in turn, whose graphs stay."""
    pipe, call = build("DiTPipeline")
    toca_compile.optimize(pipe, POLICIES["series"], lowering="eager")
    wanted = [run(pipe, call, n) for n in (4, 6)]
    toca_compile.restore(pipe)
    toca_compile.optimize(pipe, POLICIES["series"], lowering="eager", **GRAPHED)
    counts = []
    for _ in range(4):
        assert all(map(torch.equal, wanted, [run(pipe, call, n) for n in (4, 6)]))
        counts.append(len(recorders[0].graphs))
    assert 0 < counts[1] == counts[3]


class Again:
    """No recording: a replay is the call. For code that no recorder sees into."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.replays = device, 0

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        return call()

    def capture(self, call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        def replay() -> Sequence[Tensor]:
            self.replays += 1
            return call()

        return replay


@pytest.mark.inductor
@pytest.mark.usefixtures("quiet")
def test_compiled_code_takes_its_numbers_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Again(torch.device("cpu"))
    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda device: capture)
    model = randomize(PlainDiT(depth=1))
    policy = Composition(
        6, Every(3), (Rule(do=Partial(order=1)),), which=Selector("random"), how_many=Share(0.3)
    )  # fmt: skip
    plain = optimized(model, policy)
    opt = toca_compile.optimize(model, policy, **GRAPHED)
    for seed in range(3):
        torch.testing.assert_close(sample(opt, 6, noise(seed=seed)), sample(plain, 6, noise(seed=seed)))
    assert capture.replays > 6


@pytest.mark.usefixtures("quiet")
def test_a_run_that_goes_on_in_another_graph(recorders: list[Recorder]) -> None:
    """What is carried over is copied to where its graphs read it."""
    model = randomize(Cast(depth=2))
    plain, opt = optimized(model), optimized(model, **GRAPHED)
    for name in ("Taylor", "ToCa", "blocks"):
        plain.policy = opt.policy = CACHING[name]
        for _ in range(4):
            for step in range(6):
                outs = []
                for way in (plain, opt):
                    with called(way, step):
                        outs.append(way(*given(step, double=step >= 2)))
                assert torch.equal(*outs), (name, step)
    assert recorders[0].graphs


def test_what_lies_elsewhere_is_named() -> None:
    said: list[str] = []
    one = graphs.Graphs(Again(torch.device("cuda", 0)), ("x", "timestep"), (False, False), said.append)
    fixed, schedule = graphs.Fixed(torch.device("cpu")), Again(torch.device("cpu"))
    for _ in range(3):
        values: list[Any] = [1, torch.ones(2), None]
        one.run(fixed, schedule, (), values, graphs.Work((0, 1), (2,), lambda v: v.__setitem__(2, v[0] * v[1])))
        assert torch.equal(values[2], torch.ones(2))
    assert said == [
        "mode='reduce-overhead' runs without CUDA graphs: timestep lies on cpu, so that a graph would keep its numbers: "
        "pass it on cuda:0"
    ]


def test_where_a_graph_lies_is_known_after_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory stand for those of a device that is not here."""
    made: list[Recorder] = []

    def record(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setitem(graphs.CAPTURES, "meta", record)
    opt = optimized(randomize(PlainDiT(depth=1)).to("meta"), Fora(4, 2), **GRAPHED)
    with torch.no_grad(), torch.device("meta"):
        opt(noise().to("meta"), torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert [recorder.device for recorder in made] == [torch.device("meta")]
    assert toca_compile.explain(opt).program.accelerators == (torch.device("meta"),)


class Broken(PlainDiT):
    """Comes in two graphs."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.prepare(x, t, y)
        x = self.blocks[0](x, c)
        torch._dynamo.graph_break()
        x = self.blocks[1](x, c)
        return self.finish(x, c)


def test_a_model_in_several_graphs_is_said(recorders: list[Recorder], caplog: pytest.LogCaptureFixture) -> None:
    model = randomize(Broken(depth=2))
    plain, opt = optimized(model, Fora(4, 2)), optimized(model, Fora(4, 2), **GRAPHED)
    for seed in range(3):
        assert torch.equal(sample(opt, 4, noise(seed=seed)), sample(plain, 4, noise(seed=seed)))
    (said,) = (r.message for r in caplog.records)
    assert said == "mode='reduce-overhead' runs without CUDA graphs: torch.compile split the model into several graphs"


def test_the_cpu_has_none(caplog: pytest.LogCaptureFixture) -> None:
    """As torch.compile's own mode, it simply runs."""
    model = randomize(PlainDiT(depth=1))
    opt = optimized(model, Fora(4, 2), **GRAPHED)
    for _ in range(2):
        sample(opt, 4, noise())
    (said,) = (r.message for r in caplog.records)
    assert said == "mode='reduce-overhead' runs without CUDA graphs: the model lies on cpu, which has none"
    assert "mode        reduce-overhead: 0 CUDA graphs are recorded" in str(toca_compile.explain(opt))


def test_several_devices_have_none() -> None:
    several = {torch.device("cuda", 0), torch.device("cuda", 1)}
    assert graphs.capture_for(several) == "the model lies on several devices (cuda:0, cuda:1)"


@pytest.mark.usefixtures("quiet")
def test_as_a_backend(recorders: list[Recorder]) -> None:
    model = randomize(PlainDiT(depth=1))
    options = {"policy": Fora(4, 2), "lowering": "eager", "mode": "reduce-overhead"}
    compiled, plain = torch.compile(model, backend="toca", options=options), optimized(model, Fora(4, 2))
    for seed in range(3):
        assert torch.equal(sample(compiled, 4, noise(seed=seed)), sample(plain, 4, noise(seed=seed)))
    assert recorders[0].graphs


def test_the_mode_of_torch_compile_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no options beside it."""
    seen: list[Session] = []

    def uncached(session: Session, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(session)
        return gm.forward

    monkeypatch.setattr(backend, "graph_of", uncached)
    sample(torch.compile(PlainDiT(depth=1).eval(), backend="toca", mode="reduce-overhead"), 1, noise())
    assert {session.mode for session in seen} == {"reduce-overhead"}


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(toca_compile.TocaError, match="unknown mode 'fast'; choose one of default, reduce-overhead"):
        optimized(PlainDiT(), mode="fast")


# -- the recorder itself: what a GPU would do wrong ---------------------------------------------------------------------


def recorded(call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    return Recorder(torch.device("cpu")).capture(call)


def test_a_number_of_the_host_stays_what_it_was() -> None:
    x, number = torch.ones(3), [2.0]
    replay = recorded(lambda: [x * number[0]])
    number[0] = 3.0
    assert torch.equal(replay()[0], torch.full((3,), 2.0))
    x.fill_(5.0)
    assert torch.equal(replay()[0], torch.full((3,), 10.0))


def test_recording_does_nothing_and_a_replay_does_it_once() -> None:
    cache = torch.zeros(3)
    replay = recorded(lambda: [cache.add_(1.0) * 2])
    assert torch.equal(cache, torch.zeros(3))
    assert torch.equal(replay()[0], torch.full((3,), 2.0))
    assert torch.equal(replay()[0], torch.full((3,), 4.0))


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x.nonzero(), lambda x: x[x > 0]]
)
def test_a_wait_is_an_error(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with pytest.raises(GraphError, match="waits for a value on the device"):
        recorded(lambda: [x * 2, wait(x)])


def test_memory_that_is_gone_is_an_error() -> None:
    """As of an input that nobody copied."""
    held = [torch.ones(3)]
    replay = recorded(lambda: [held[0] * 2])
    replay()
    held[0] = torch.ones(3)
    with pytest.raises(GraphError, match="memory that is gone"):
        replay()


@pytest.mark.parametrize("left_out", [(graphs.Numbers, "write"), (graphs.Fixed, "copy_in")])
def test_what_a_replay_is_not_told_is_seen(
    traced: Traced, left_out: tuple[Any, str], recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests rest on: without the numbers of its step, or its inputs, a sampling is another."""
    model = randomize(PlainDiT(depth=1))
    (_, plain), opt = traced(PlainDiT, POLICIES["series"], depth=1), optimized(model, POLICIES["series"], **GRAPHED)
    for seed in range(2):
        sample(opt, 10, noise(seed=seed))
    monkeypatch.setattr(*left_out, lambda *_: None)
    assert not torch.equal(sample(opt, 10, noise(seed=3)), sample(plain, 10, noise(seed=3)))


def test_caches_that_move_are_seen(recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[graphs.Fixed] = []
    take = graphs.Fixed.take

    def taken(self: graphs.Fixed, *run: Any) -> None:
        made.append(self)
        take(self, *run)

    monkeypatch.setattr(graphs.Fixed, "take", taken)
    opt = optimized(randomize(PlainDiT(depth=1)), Fora(4, 2), **GRAPHED)
    for seed in range(2):
        sample(opt, 4, noise(seed=seed))
    made[-1]._buffers.clear()
    with pytest.raises(GraphError, match="memory that is gone"):
        sample(opt, 4, noise())
