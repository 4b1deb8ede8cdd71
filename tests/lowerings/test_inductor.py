"""A few runs through Inductor: the same numbers, one compilation for each distinct variant, none in the loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import toca_compile
from tests.models import FusedFlux, PlainDiT, RegisterDiT, randomize
from tests.pipelines import flux, pixart
from tests.sampling import noise, sample, sample_flux, sample_pixart
from toca_compile import BlockCache, FullCompute, TaylorSeer, TaylorToCa, ToCa, preset
from toca_compile.ir.plan import Policy
from toca_compile.ir.program import Variant
from toca_compile.lowerings import inductor

pytestmark = pytest.mark.inductor


@pytest.mark.parametrize("style", [PlainDiT, RegisterDiT])
def test_a_whole_run_is_the_eager_run(style: type[nn.Module]) -> None:
    model = randomize(style())
    policy = preset("dit-xl-2/ddim-50", fresh_ratio=0.2)
    x = noise()
    eager = sample(toca_compile.optimize(model, policy, lowering="eager"), 50, x)
    opt = toca_compile.optimize(model, policy)
    torch.testing.assert_close(sample(opt, 50, x), eager, rtol=1e-4, atol=1e-4)

    # The second run, a second policy with other ratios, and a deeper model of the same blocks compile nothing.
    before, graphs = inductor.compiles, counters["stats"]["unique_graphs"]
    sample(opt, 50, x)
    other = preset("dit-xl-2/ddim-50", fresh_ratio=0.11)
    opt.policy = other
    expected = sample(toca_compile.optimize(model, other, lowering="eager"), 50, x)
    graphs = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(sample(opt, 50, x), expected, rtol=1e-4, atol=1e-4)
    assert inductor.compiles == before
    assert counters["stats"]["unique_graphs"] == graphs
    assert toca_compile.summary(opt).recompiles == 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["pixart", "flux", "taylor"])
def test_other_systems_are_their_eager_runs(name: str) -> None:
    """Cross-attention with entropies and text computed once; held attention and several streams; forecasts."""
    pytest.importorskip("diffusers")
    policy: Policy
    run: Callable[[Any], Tensor]
    if name == "pixart":
        model, policy = pixart(), preset("pixart-alpha/dpm-20", num_steps=7)
        run = lambda m: sample_pixart(m, 7, 1, (8, 12), False)  # noqa: E731
    elif name == "flux":
        model, policy = FusedFlux(flux()).eval(), preset("flux-dev/50-n4", num_steps=7, fresh_ratio=0.3)
        run = lambda m: sample_flux(m, 7, 1, (6, 6))  # noqa: E731
    else:
        model = randomize(PlainDiT(depth=2))
        policy = TaylorSeer(12, 3, 2, basis="newton", cache_dtype="bfloat16")
        run = lambda m: sample(m, 12, noise())  # noqa: E731
    runs = [run(toca_compile.optimize(model, policy, lowering=way)) for way in ("eager", "inductor")]
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3)


def test_depth_costs_no_compilation() -> None:
    policy = ToCa(num_steps=4, interval=4, fresh_ratio=0.3, schedule="constant")
    counts = []
    for depth in (2, 6):
        torch._dynamo.reset()
        inductor.clear()
        before = inductor.compiles
        opt = toca_compile.optimize(randomize(PlainDiT(depth=depth)), policy)
        sample(opt, 4, noise())
        counts.append(inductor.compiles - before)
    assert counts == [4, 4]  # two pieces of glue, the full and the partial block


def test_single_tokens_and_batches_of_one() -> None:
    """K = 1 and B = 1 are sizes as any other to the symbolic graph."""
    model = randomize(PlainDiT())
    for batch in (1, 2):
        policy = ToCa(num_steps=4, interval=4, fresh_ratio=1 / 16, schedule="constant")
        runs = [
            sample(toca_compile.optimize(model, policy, lowering=way), 4, noise(batch)) for way in ("eager", "inductor")
        ]
        torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


def test_full_compute_and_torch_compile() -> None:
    model = randomize(PlainDiT())
    opt = toca_compile.optimize(model, FullCompute())
    torch.testing.assert_close(sample(opt, 2, noise()), sample(model, 2, noise()), rtol=1e-4, atol=1e-4)
    policy = ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant")
    compiled = torch.compile(model, backend="toca", options={"policy": policy}, fullgraph=True)
    eager = toca_compile.optimize(model, policy, lowering="eager")
    torch.testing.assert_close(sample(compiled, 4, noise()), sample(eager, 4, noise()), rtol=1e-4, atol=1e-4)


def test_caches_are_changed_in_place() -> None:
    opt = toca_compile.optimize(
        randomize(PlainDiT()), ToCa(num_steps=6, interval=3, fresh_ratio=0.3, schedule="constant")
    )
    x, y = noise(), torch.arange(2)
    with torch.inference_mode():
        opt(x, torch.full((2,), 900), y)
        opt(x, torch.full((2,), 800), y)
        places = {k: b.data_ptr() for k, b in toca_compile.explain(opt).buffers.items()}
        for t in (700, 600, 500):  # the last step would free them
            opt(x, torch.full((2,), t), y)
        after = {k: b.data_ptr() for k, b in toca_compile.explain(opt).buffers.items()}
    assert places == after


@pytest.mark.parametrize(
    "policy",
    [
        TaylorToCa(8, 4, 2, 0.4, keys="update"),
        BlockCache(8, threshold=0.6, order=1),
    ],
    ids=["queries", "blocks"],
)
def test_queries_and_skipped_blocks(policy: Policy) -> None:
    """Keys updated in place, histories of single tokens, and the small graphs around a skipped range."""
    model = randomize(PlainDiT())
    models = {way: toca_compile.optimize(model, policy, lowering=way) for way in ("eager", "inductor")}
    runs = [sample(m, 8, noise()) for m in models.values()]
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3)
    kinds = [[r.kind for r in m.steps] for m in models.values()]
    assert kinds[0] == kinds[1]
    before = inductor.compiles
    sample(models["inductor"], 8, noise(seed=5))
    assert inductor.compiles == before


def test_what_is_moved_from_buffer_to_buffer_is_read_before_it_is_overwritten() -> None:
    """In whatever order they are given."""
    for order in (("a", "b"), ("b", "a")):
        graph, store = fx.Graph(), torch.ops.toca.store_.default
        given = {name: graph.placeholder(name) for name in ("x", *order)}
        graph.call_function(store, (given["b"], given["a"]))
        graph.call_function(store, (given["a"], given["x"]))
        graph.output(())
        variant = Variant(fx.GraphModule({}, graph), (), ())
        values = [torch.rand(4, 4) for _ in given]
        wanted = [value.clone() for value in values]
        variant.module(*wanted)
        inductor.lower(variant, values)(*values)
        assert all(map(torch.equal, values, wanted))
