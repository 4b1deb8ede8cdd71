"""``toca_compile.summary``: what the calls of the last sampling did, took and saved."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests.models import PlainDiT, randomize
from tests.pair import Pair
from tests.sampling import noise, sample
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa, TocaError
from toca_compile.policies import Level


def optimized(policy: Any, model: Any = None) -> Any:
    torch._dynamo.reset()
    return toca_compile.optimize(randomize(model or PlainDiT(depth=1)), policy, lowering="eager")


def test_steps_time_and_flops_of_a_sampling() -> None:
    opt = optimized(ToCa(8, 4, 0.3, "constant"))
    sample(opt, 8, noise())
    first, report = toca_compile.summary(opt), toca_compile.explain(opt)
    assert {kind: step.calls for kind, step in first.steps.items()} == report.step_counts == {"full": 2, "partial": 6}
    assert first.compiling_calls == 2  # the first full step, and the first partial one
    assert first.compiling_seconds > 0
    sample(opt, 8, noise(seed=3))
    told = toca_compile.summary(opt)
    assert (told.calls, told.compiling_calls, told.compiling_seconds) == (8, 0, 0)
    assert told.flops == report.run_flops()
    assert told.full_flops == 8 * report.flops("full")
    assert told.flop_speedup == pytest.approx(report.flop_speedup())
    assert told.flops_saved == told.full_flops - told.flops > 0
    assert told.seconds == pytest.approx(sum(r.seconds for r in opt.steps))
    mean = told.steps["full"].mean_seconds
    assert mean is not None
    assert told.seconds_saved == pytest.approx(8 * mean - told.seconds)
    assert told.speedup == pytest.approx(8 * mean / told.seconds)


def test_the_cache_at_its_peak_and_now() -> None:
    opt = optimized(TaylorSeer(6, 2, 1))
    sample(opt, 4, noise())
    half = toca_compile.summary(opt)
    assert half.cache_bytes == half.peak_cache_bytes == opt.cache_bytes > 0
    opt.reset()
    sample(opt, 6, noise())
    whole = toca_compile.summary(opt)
    assert whole.cache_bytes == 0
    assert whole.peak_cache_bytes == toca_compile.explain(opt).cache_bytes


def test_what_was_skipped_by_a_test_at_run_time_is_counted() -> None:
    opt = optimized(BlockCache(8, threshold=0.5), PlainDiT(depth=3))
    sample(opt, 8, noise())
    told = toca_compile.summary(opt)
    assert told.steps["skip"].calls == sum(r.kind == "skip" for r in opt.steps) > 0
    assert told.flops == toca_compile.explain(opt).run_flops()


def test_a_policy_that_saves_nothing_says_so() -> None:
    opt = optimized(FullCompute())
    sample(opt, 3, noise())
    told = toca_compile.summary(opt)
    assert told.steps["full"].calls == 3
    assert told.flop_speedup == 1


class Broken(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.prepare(x, t, y)
        torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x, c)
        torch._dynamo.graph_break()
        return self.finish(x, c)


def test_graphs_breaks_recompiles_and_warnings() -> None:
    opt = optimized(Fora(4, 2))
    sample(opt, 4, noise())
    told = toca_compile.summary(opt)
    assert (told.graphs, told.breaks, told.recompiles) == (1, (), 0)
    sample(opt, 4, noise(batch=1))
    told = toca_compile.summary(opt)
    assert (told.graphs, told.breaks, told.recompiles) == (2, (), 1)


def test_a_model_in_several_graphs_tells_why() -> None:
    opt = optimized(Level("quality", 4), Broken(depth=1))
    sample(opt, 4, noise())
    told = toca_compile.summary(opt)
    assert told.recompiles == 0
    assert len(told.breaks) == 2
    assert all("test_summary.py" in reason for reason in told.breaks)
    assert any("nothing is cached" in warning for warning in told.warnings)
    assert "2 graph breaks" in str(told)
    assert "warning" in str(told)


def test_a_bare_torch_compile_is_timed_too() -> None:
    torch._dynamo.reset()
    model = randomize(PlainDiT(depth=1))
    net = torch.compile(model, backend="toca", options={"policy": Fora(4, 2), "lowering": "eager"})
    sample(net, 4, noise())
    sample(net, 4, noise())
    told = toca_compile.summary(net)
    assert {kind: step.timed for kind, step in told.steps.items()} == {"full": 2, "reuse": 2}
    assert told.recompiles == 0
    seconds = [s for graph in toca_compile.explain(net).data for step in graph.steps for s in step.seconds]
    assert min(seconds) > 0


def test_the_text_is_narrow_and_the_dictionary_is_json() -> None:
    opt = optimized(ToCa(8, 4, 0.3, "constant"))
    assert "none yet" in str(toca_compile.summary(opt))
    sample(opt, 8, noise())
    told = toca_compile.summary(opt)
    text = str(told)
    assert max(map(len, text.splitlines())) <= 100
    for words in ("PlainDiT", "ToCa(num_steps=8", "partial", "compiling", "no recompile", "at most"):
        assert words in text
    sample(opt, 8, noise())
    assert "an estimate" in str(toca_compile.summary(opt))
    data = json.loads(json.dumps(told.as_dict()))
    assert data["steps"]["partial"]["calls"] == 6
    assert data["flops_saved"] == told.flops_saved


def test_each_transformer_of_a_pipeline_has_its_own() -> None:
    pipe = Pair()
    toca_compile.optimize(pipe, Fora(4, 2), lowering="eager")
    pipe(4)
    told = toca_compile.summary(pipe)
    assert {name: part.calls for name, part in told.transformers.items()} == {"transformer": 2, "transformer_2": 2}
    assert (told.calls, told.graphs) == (4, 2)
    assert told.flops == sum(part.flops for part in told.transformers.values())
    assert [line for line in str(told).splitlines() if line.startswith("transformer")] == [
        "transformer: PlainDiT", "transformer_2: PlainDiT"
    ]  # fmt: skip
    assert list(json.loads(json.dumps(told.as_dict()))["transformers"]) == ["transformer", "transformer_2"]


def test_another_object_is_refused() -> None:
    with pytest.raises(TocaError, match="summary takes a model or a pipeline optimised by toca_compile"):
        toca_compile.summary(PlainDiT())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_gpu() -> None:
    torch._dynamo.reset()
    opt = toca_compile.optimize(randomize(PlainDiT(depth=1)).cuda(), Fora(4, 2), lowering="eager")
    sample(opt, 4, noise().cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, t, y = noise().cuda(), torch.full((2,), 900, device="cuda"), torch.arange(2, device="cuda")
        opt.reset()
        with torch.no_grad():
            opt(x, t, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert toca_compile.summary(opt).steps["full"].seconds > 0
