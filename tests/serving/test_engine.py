"""The engine: each result is that of the request run alone, whatever came and went beside it."""

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import _functional_collectives

from tests.models import PlainDiT, randomize
from tests.sampling import noise
from tests.serving.alone import Alone, failing, picture, positional, same, words_and_patches
from toca_compile import (
    BlockCache,
    ClusCa,
    Engine,
    Fora,
    FullCompute,
    PolicyError,
    Request,
    TaylorSeer,
    TaylorToCa,
    ToCa,
    TocaError,
)
from toca_compile.policies import Anchors, Composition, Dmd, SkipBlocks
from toca_compile.policies.composition import Rule
from toca_compile.policies.levels import Level
from toca_compile.policies.when import Every
from toca_compile.serving.requests import Sampling, call
from toca_compile.serving.turns import LaidOut

POLICIES: dict[str, Any] = {
    "everything is computed": FullCompute(),
    "reuse": Fora(8, 3),
    "differences": TaylorSeer(8, 3, 2, warmup=1),
    "tokens by age and score": ToCa(8, 4, 0.3, schedule="constant"),
    "tokens at random": ToCa(8, 4, 0.3, schedule="constant", score="random"),
    "tokens with histories": TaylorToCa(8, 4, 1, 0.3),
    "clusters": ClusCa(8, 4, clusters=4),
    "skipped blocks": BlockCache(8, first=1, interval=3, order=1),
    "anchors in a ring": Level("fast", 8),
}


def flux() -> nn.Module:
    """FLUX, very small."""
    from diffusers import FluxTransformer2DModel

    return randomize(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False,
            axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip


def test_requests_at_different_steps_are_each_as_if_alone() -> None:
    model = randomize(PlainDiT(depth=2))
    engine, alone = Engine(model, lowering="eager", sizes=(1, 2, 4)), Alone(model)
    for policy in POLICIES.values():
        given = [(0, 8, None), (1, 6, None), (2, 12, None), (3, 8, 2.0), (4, 9, 1.5)]
        requests = [picture(*g) for g in given]
        tickets = []
        for request in requests:
            tickets.append(engine.submit(request, policy))
            engine.tick()
        engine.run()
        for request, ticket in zip(requests, tickets, strict=True):
            same(ticket.result(), alone(request, policy))
            assert ticket.steps == request.num_steps


def test_whatever_comes_and_goes_beside_a_request_it_is_as_if_alone() -> None:
    model = randomize(PlainDiT(depth=2))
    engine, alone = Engine(model, lowering="eager", sizes=(1, 2, 4)), Alone(model)
    names = ["differences", "tokens by age and score", "skipped blocks", "anchors in a ring"]
    one = st.tuples(
        st.sampled_from(names), st.integers(0, 2), st.sampled_from([5, 8]), st.sampled_from([None, 2.0]),
        st.integers(0, 4), st.sampled_from(["runs"] * 4 + ["cancelled", "fails"]),
    )  # fmt: skip

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(one, min_size=2, max_size=6))
    def check(arrivals: list[Any]) -> None:
        tickets = []
        for name, seed, steps, guidance, wait, fate in arrivals:
            request = picture(seed, steps, guidance)
            asked = failing(request, 3, lambda: ValueError("it failed")) if fate == "fails" else request
            tickets.append(engine.submit(asked, POLICIES[name]))
            for _ in range(wait):
                engine.tick()
            if fate == "cancelled":
                tickets[-1].cancel()
        engine.run()
        assert engine.pending == 0
        for ticket, (name, seed, steps, guidance, wait, fate) in zip(tickets, arrivals, strict=True):
            if fate == "fails":
                assert str(ticket.exception()) == "it failed"
            elif not ticket.cancelled():
                key = (name, seed, steps, guidance)
                same(ticket.result(), alone(picture(seed, steps, guidance), POLICIES[name], key))
            else:
                assert (fate, wait < steps) == ("cancelled", True)

    check()
    assert engine.statistics.samples > engine.statistics.calls  # some did share calls


def test_words_and_patches_that_arrive_in_any_order() -> None:
    model = flux()
    engine, alone = Engine(model, lowering="eager", sizes=(1, 2, 4)), Alone(model)
    policies = {"level": Level("fast", 8), "tokens": ToCa(8, 3, 0.4, schedule="constant")}
    one = st.tuples(st.sampled_from(list(policies)), st.integers(0, 1), st.sampled_from([6, 8]), st.integers(0, 3))

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(one, min_size=2, max_size=5))
    def check(arrivals: list[Any]) -> None:
        tickets = []
        for name, seed, steps, wait in arrivals:
            tickets.append(engine.submit(words_and_patches(seed, steps), policies[name]))
            for _ in range(wait):
                engine.tick()
        engine.run()
        for ticket, (name, seed, steps, _) in zip(tickets, arrivals, strict=True):
            expected = alone(words_and_patches(seed, steps), policies[name], (name, seed, steps))
            same(ticket.result(), expected)

    check()
    assert engine.statistics.samples > engine.statistics.calls


def test_after_warm_up_nothing_is_traced_or_compiled() -> None:
    engine = Engine(randomize(PlainDiT(depth=1)), Fora(8, 3), lowering="eager", sizes=(1, 2, 4))
    engine.warm_up(picture(0), steps=(8, 5))
    known = engine.graphs, engine.variants
    assert known[0] == 3
    for wait in range(4):
        for seed in range(5):
            engine.submit(picture(seed, (8, 5)[seed % 2]))
            for _ in range(wait):
                engine.tick()
        engine.run()
    assert (engine.graphs, engine.variants) == known


def test_requests_in_step_share_a_call_whatever_the_lengths_of_their_runs() -> None:
    engine = Engine(randomize(PlainDiT(depth=1)), Fora(8, 4), lowering="eager", sizes=(1, 2, 4))
    for steps in (8, 12, 7):
        engine.submit(picture(steps, steps))
    engine.tick()
    assert engine.statistics.calls == 1
    late = engine.submit(picture(0, 5))
    for _ in range(3):
        engine.tick()
    assert engine.statistics.calls == 1 + 3  # the late one waits
    assert late.steps == 0
    engine.tick()
    assert engine.statistics.calls == 1 + 3 + 1  # and computes everything with the others
    assert late.steps == 1


def test_slots_beyond_the_memory_are_waited_for() -> None:
    model = randomize(PlainDiT(depth=1))
    free = Engine(model, Fora(4, 2), lowering="eager", sizes=(1,))
    free.sample([picture(0, 4)])
    slot = 2 * 16 * 16 * 4  # two sites' outputs, 16 tokens of width 16
    assert free.cache_bytes == 5 * slot  # four slots, and the one that is computed
    engine = Engine(model, Fora(4, 2), lowering="eager", sizes=(1, 2), memory=5 * slot)
    tickets = [engine.submit(picture(seed, 4)) for seed in range(7)]
    most = 0
    while engine.pending:
        most = max(most, engine.tick())
        assert engine.cache_bytes <= 5 * slot
    assert most == 2  # as many as a batch of half of the memory holds
    alone = Alone(model)
    for seed, ticket in enumerate(tickets):
        same(ticket.result(), alone(picture(seed, 4), Fora(4, 2)))


def test_no_more_are_at_work_than_a_batch_holds() -> None:
    """In the order in which they came; those of another kind do not wait for them."""
    model = randomize(PlainDiT(depth=1))
    engine = Engine(model, Fora(4, 2), lowering="eager", sizes=(1, 2))
    tickets = [engine.submit(picture(seed, 4)) for seed in range(3)]
    tickets.append(engine.submit(picture(3, 4, 2.0)))
    assert engine.tick() == 3
    assert [ticket.steps for ticket in tickets] == [1, 1, 0, 1]
    engine.run()
    alone = Alone(model)
    for ticket, one in zip(tickets, ((0, 4), (1, 4), (2, 4), (3, 4, 2.0)), strict=True):
        same(ticket.result(), alone(picture(*one), Fora(4, 2)))


def test_a_policy_that_keeps_more_waits_for_room_too() -> None:
    model = randomize(PlainDiT(depth=1))
    slot = 2 * 16 * 16 * 4
    engine = Engine(model, Fora(4, 2), lowering="eager", sizes=(1,), memory=9 * slot)
    first = [engine.submit(picture(seed, 4)) for seed in range(6)]
    engine.tick()
    more = engine.submit(picture(0, 4), TaylorSeer(4, 2, 2))  # three times as much in each slot
    while engine.pending:
        engine.tick()
        assert engine.cache_bytes <= 9 * slot
    alone = Alone(model)
    same(more.result(), alone(picture(0, 4), TaylorSeer(4, 2, 2)))
    for seed, ticket in enumerate(first):
        same(ticket.result(), alone(picture(seed, 4), Fora(4, 2)))


def test_a_memory_that_holds_no_request_is_said() -> None:
    engine = Engine(randomize(PlainDiT(depth=1)), Fora(4, 2), lowering="eager", sizes=(1,), memory=3000)
    with pytest.raises(TocaError, match="memory=3000 holds no request"):
        engine.sample([picture(0, 4)])


def test_what_computes_everything_waits_for_others_to() -> None:
    model = randomize(PlainDiT(depth=1))
    engine = Engine(model, Fora(9, 3), lowering="eager", sizes=(1, 2))
    tickets = [engine.submit(picture(0, 9))]
    engine.tick()
    tickets.append(engine.submit(picture(1, 9)))
    waited = []
    while engine.pending:
        engine.tick()
        waited.append(tuple(ticket.steps for ticket in tickets))
    # A whole interval behind, and never alone before the first is done.
    assert waited[:4] == [(2, 0), (3, 0), (4, 1), (5, 2)]
    assert engine.statistics.calls == 9 + 3
    for seed, ticket in enumerate(tickets):
        same(ticket.result(), Alone(model)(picture(seed, 9), Fora(9, 3)))


def test_weights_are_of_each_sample() -> None:
    """Forecasts of skipped blocks, and what makes up for them, share calls at whichever steps and in runs of whichever
    lengths; so do requests of one sample and of two that one graph is of."""
    model, calls = randomize(PlainDiT(depth=2)), {}
    alone, policy = Alone(model), Level("fast", 8)
    given = [(0, 16, None), (1, 6, None), (2, 12, None), (3, 8, 2.0)]
    for sizes in ((1,), (1, 2, 4)):
        engine = Engine(model, policy, lowering="eager", sizes=sizes)
        tickets = []
        for one in given:
            tickets.append(engine.submit(picture(*one)))
            engine.tick()
        engine.run()
        calls[sizes] = engine.statistics.calls
        for one, ticket in zip(given, tickets, strict=True):
            same(ticket.result(), alone(picture(*one), policy))
    assert calls == {(1,): 42, (1, 2, 4): 29}


def test_it_waits_for_an_interval_of_its_own_policy_at_most() -> None:
    """However many come that compute everything at other steps, or never."""
    model = randomize(PlainDiT(depth=1))
    engine = Engine(model, Fora(20, 20), lowering="eager", sizes=(1, 2))
    engine.submit(picture(0, 20))
    engine.tick()
    short = engine.submit(picture(1, 6), Fora(6, 3))
    steps = []
    while not short.done():
        engine.tick()
        steps.append(short.steps)
    assert steps == [0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 5, 6]
    engine.run()
    same(short.result(), Alone(model)(picture(1, 6), Fora(6, 3)))


class Batched(PlainDiT):
    """Each sample is shifted by the mean of all."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True) / 2, t, y)


class Placed(PlainDiT):
    """Each sample is shifted by its place in the batch."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + torch.arange(len(x), device=x.device)[:, None, None, None] / 2, t, y)


@pytest.mark.parametrize("kind", [Batched, Placed])
def test_a_model_that_mixes_samples_is_computed_request_by_request(
    kind: type[PlainDiT], caplog: pytest.LogCaptureFixture
) -> None:
    model = randomize(kind(depth=1))
    engine = Engine(model, Fora(4, 2), lowering="eager", sizes=(1, 2))
    tickets = [engine.submit(picture(seed, 4, guidance=2.0)) for seed in range(2)]
    engine.run()
    assert "requests are computed one by one, not in batches" in caplog.text
    assert "test_engine.py" in caplog.text  # the line
    assert engine.statistics.calls == 8
    alone = Alone(model)
    for seed, ticket in enumerate(tickets):
        same(ticket.result(), alone(picture(seed, 4, guidance=2.0), Fora(4, 2)))


def test_policies_that_decide_for_a_batch_are_refused_by_name() -> None:
    engine = Engine(randomize(PlainDiT(depth=2)), "balanced", lowering="eager", sizes=(1, 2))
    adaptive = BlockCache(8, first=1, threshold=0.1)
    measured = Composition(8, Every(3), (Rule(SkipBlocks(do=Anchors(Dmd(), 3))),))
    refused = [engine.submit(picture(0), policy) for policy in (adaptive, measured)]
    good = engine.submit(picture(0))
    engine.run()
    for ticket, (name, why) in zip(
        refused, [("BlockCache", "decides at run time"), ("Composition", "values of a whole batch")], strict=True
    ):
        with pytest.raises(PolicyError, match=rf"{name}.* {why}"):
            ticket.result()
    assert good.result().shape == (1, 2, 8, 8)


def test_what_is_wrong_with_a_request_is_its_own_affair() -> None:
    engine = Engine(randomize(PlainDiT(depth=1)), Fora(4, 2), lowering="eager", sizes=(1, 2))

    def longer(request: Request) -> Sampling:
        yield from positional(request)
        yield call(request.latents, torch.zeros(1), request.conditioning["y"])

    def grows(request: Request) -> Sampling:
        yield call(request.latents, torch.zeros(1), request.conditioning["y"])
        yield call(noise(2), torch.zeros(2), torch.zeros(2, dtype=torch.long))

    def strange(request: Request) -> Sampling:
        yield {"x": request.latents}  # type: ignore[misc]

    def none(request: Request) -> Sampling:
        return 5
        yield

    wrong: dict[Any, str] = {
        longer: "more than the 4 model calls", grows: "other shapes, dtypes or numbers", strange: "yields model calls",
    }  # fmt: skip
    tickets = {s: engine.submit(Request(noise(1), {"y": torch.tensor([0])}, 4, sampler=s)) for s in (*wrong, none)}
    good = engine.submit(picture(0, 4))
    engine.run()
    for sampler, message in wrong.items():
        with pytest.raises(TocaError, match=message):
            tickets[sampler].result()
    assert tickets[none].result() == 5
    assert good.result().shape == (1, 2, 8, 8)
    told = engine.statistics
    assert (told.done, told.failed, told.cancelled) == (2, 3, 0)


def test_a_batch_that_fails_is_tried_request_by_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(PlainDiT(depth=1))
    engine, alone = Engine(model, Fora(6, 3), lowering="eager", sizes=(1, 2)), Alone(model)
    tickets = [engine.submit(picture(seed, 6)) for seed in range(2)]
    computed = LaidOut.step

    def out_of_memory(self: LaidOut, *given: Any) -> Any:
        answer = computed(self, *given)  # what lies in the batch's buffers is spoilt
        if len(answer[0]) > 1:
            raise RuntimeError("out of memory")
        return answer

    engine.tick()
    monkeypatch.setattr(LaidOut, "step", out_of_memory)
    for _ in range(3):
        engine.tick()
    assert engine.statistics.calls == 1 + 3 * 2
    monkeypatch.undo()
    engine.run()
    for seed, ticket in enumerate(tickets):
        same(ticket.result(), alone(picture(seed, 6), Fora(6, 3)))


def test_in_a_thread_of_its_own_it_is_done_with_all_when_it_is_left() -> None:
    engine = Engine(randomize(PlainDiT(depth=1)), Fora(4, 2), lowering="eager", sizes=(1, 2, 4))
    with engine:
        tickets = [engine.submit(picture(seed, 4)) for seed in range(3)]
        assert tickets[0].result(timeout=60).shape == (1, 2, 8, 8)
        late: list[Any] = []
        others = [threading.Thread(target=lambda: late.append(engine.submit(picture(0, 4)))) for _ in range(3)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()
    assert all(ticket.done() for ticket in (*tickets, *late))
    assert engine.pending == 0


def test_what_it_is_made_of_is_checked() -> None:
    model = PlainDiT(depth=1)
    for wrong, message in [
        ({"sizes": (2, 4)}, "sizes must ascend from 1"),
        ({"memory": -1}, "memory must be"),
        ({"hoist": True}, "not hoist"),
    ]:
        with pytest.raises(TocaError, match=message):
            Engine(model, **wrong)
    with pytest.raises(TocaError, match=r"takes a torch.nn.Module"):
        Engine(lambda x: x)
    with pytest.raises(TocaError, match="at least one step"):
        Engine(model).submit(picture(0, 0))


class Summed(PlainDiT):
    """Its tokens are a sum over processes."""

    def prepare(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        tokens, c = super().prepare(x, t, y)
        return _functional_collectives.all_reduce(tokens, "sum", dist.group.WORLD), c


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_model_that_processes_share_is_refused() -> None:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        engine = Engine(randomize(Summed(depth=1)), Fora(4, 2), lowering="eager")
        with pytest.raises(TocaError, match="several processes share the model"):
            engine.sample([picture(0, 4)])
    finally:
        dist.destroy_process_group()
