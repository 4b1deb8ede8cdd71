"""What ``explain`` prints: narrow, complete, and there before the first call."""

from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.pair import Pair
from tests.sampling import noise, sample
from toca_compile import BlockCache, TaylorSeer, ToCa, TocaError, preset
from toca_compile.policies import Level
from toca_compile.report.text import policy_name


def optimized(policy: Any, model: Any = None) -> Any:
    torch._dynamo.reset()
    return toca_compile.optimize(randomize(model or PlainDiT(depth=2)), policy, lowering="eager")


POLICY = ToCa(8, 4, 0.3, "constant")


def test_before_the_first_call_it_says_what_is_known() -> None:
    report = toca_compile.explain(optimized(POLICY))
    text = str(report)
    assert "ToCa(num_steps=8, interval=4, fresh_ratio=0.3, schedule='constant')" in text
    assert "eager" in text
    assert "nothing is compiled yet" in text
    assert (report.sites, report.plans, report.data, report.compiled) == ((), (), (), False)
    for ask in (lambda: report.plan, lambda: report.schedule, lambda: report.flops("full"), report.flop_speedup):
        with pytest.raises(TocaError, match="call the model once"):
            ask()


def test_a_level_is_told_by_its_name_and_what_a_scheduler_says_in_short() -> None:
    pipe: Any = toca_compile.optimize(Pair(), lowering="eager")
    assert "policy      Level(name='balanced')" in str(toca_compile.explain(pipe)).splitlines()
    moves = tuple(-1.5 - i for i in range(20))
    assert policy_name(Level("fast", 20, noise=True, moves=moves)) == (
        "Level(name='fast', num_steps=20, noise=True, moves=(-1.5, …, -20.5: 20 numbers))"
    )
    assert policy_name(Level("fast", 3, moves=moves[:3])).endswith("moves=(-1.5, -2.5, -3.5))")


def test_what_each_site_does_under_the_policy() -> None:
    opt = optimized(POLICY)
    sample(opt, 8, noise())
    lines = str(toca_compile.explain(opt)).splitlines()
    attention = next(i for i, line in enumerate(lines) if line.startswith("blocks.0 …"))
    mlp = next(i for i, line in enumerate(lines) if line.startswith("blocks.0.mlp …"))
    assert lines[attention + 1].split() == "does compute 2, reuse 6".split()
    assert lines[mlp + 1].split() == "does compute 2, partial 6 (4 of 16 tokens)".split()
    assert lines[mlp + 2].split() == "may compute, partial, forecast, reuse, skip".split()
    assert any("prediction" in line and "fewer FLOPs" in line for line in lines)
    assert "inputs      x f32[2, 2, 8, 8], t i64[2], y i64[2]" in lines
    assert any(line.split()[:2] == ["P", "partial"] for line in lines)  # the legend


@pytest.mark.parametrize(
    "policy", [POLICY, TaylorSeer(250, 3, 2), BlockCache(8, 0, interval=4), preset("dit-xl-2/ddim-50")]
)
def test_no_line_is_wide(policy: Any) -> None:
    opt = optimized(policy)
    sample(opt, 2, noise())
    text = str(toca_compile.explain(opt))
    assert max(map(len, text.splitlines())) <= 100


def test_each_shape_has_a_heading_and_equal_tables_are_printed_once() -> None:
    opt = optimized(POLICY)
    sample(opt, 8, noise())
    sample(opt, 8, noise(batch=1))
    text = str(toca_compile.explain(opt))
    assert "inputs 1    x f32[2, 2, 8, 8]" in text
    assert "inputs 2    x f32[1, 2, 8, 8]" in text
    assert "its sites are those of inputs 1" in text
    assert text.count("blocks.0.mlp … blocks.1.mlp  (×2)") == 1


def test_all_transformers_of_a_pipeline_are_explained() -> None:
    pipe = Pair()
    toca_compile.optimize(pipe, preset("dit-xl-2/ddim-50"), lowering="eager")
    before = str(toca_compile.explain(pipe))
    assert before.count("nothing is compiled yet") == 2
    pipe(4)
    report = toca_compile.explain(pipe)
    text = str(report)
    assert "transformer: PlainDiT\n" in text
    assert 'preset("dit-xl-2/ddim-50")\n            in the last run for 4 steps' in text
    assert "transformer_2: PlainDiT\n" in text
    assert text.count("schedule  ") == 2
    assert text.count("every site computes all its tokens") == 1  # one legend
    assert list(report.transformers) == ["transformer", "transformer_2"]
    assert len(report.sites) == 2 * len(report.transformers["transformer"].sites)
    assert max(map(len, text.splitlines())) <= 100


def test_the_data_of_all_steps_is_in_one_place() -> None:
    opt = optimized(POLICY)
    sample(opt, 8, noise())
    report = toca_compile.explain(opt)
    (graph,) = report.data
    assert [site.name for site in graph.sites] == ["blocks.0", "blocks.0.mlp", "blocks.1", "blocks.1.mlp"]
    assert [step.letter for step in graph.steps] == list(report.schedule)
    assert sum(step.flops for step in graph.steps) == report.run_flops()
    for step, record in zip(graph.steps, opt.steps, strict=True):
        assert dict(zip([s.name for s in graph.sites], step.tokens, strict=True)) == record.k
        assert step.seconds == (() if record.compiled else (record.seconds,))
    assert graph.steps[1].actions == ("reuse", "partial", "reuse", "partial")


# -- names ------------------------------------------------------------------------------------------------------------


def names(opt: Any) -> list[str]:
    sample(opt, 2, noise())
    return [site.name for site in toca_compile.explain(opt).sites]


class OneModule(nn.Module):
    """Attention and MLP of a block are both its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.down(self.up(x).relu())


def test_branches_of_one_module_have_names_of_their_own() -> None:
    opt = optimized(POLICY, nn.Sequential(OneModule(), OneModule()))
    with torch.no_grad():
        opt(torch.randn(2, 16, 8))
    found = [site.name for site in toca_compile.explain(opt).sites]
    assert found == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    assert len(opt.fresh_tokens()) == 4


def decorated(forward: Any) -> Any:
    @wraps(forward)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return outer


@pytest.mark.parametrize("way", ["hook", "forward", "method", "closure"])
def test_names_begin_where_the_users_names_begin(way: str) -> None:
    torch._dynamo.reset()
    model = randomize(PlainDiT(depth=1))
    if way == "hook":
        model.register_forward_hook(lambda *_: None)
    if way == "forward":
        inner = model.forward
        model.forward = lambda *args: inner(*args)
    if way == "method":
        model.forward = decorated(model.forward)
    if way == "closure":

        def forward(s: Any) -> Any:
            return lambda x, t, y: PlainDiT.forward(s, x, t, y)

        model.forward = forward(model)
    opt = toca_compile.optimize(model, POLICY, lowering="eager")
    assert names(opt) == ["blocks.0", "blocks.0.mlp"]
