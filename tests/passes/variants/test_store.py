"""Store: buffers that lie otherwise in memory than they are seen, in the graph and over whole runs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import BlockCache, DuCa, Fora, PolicyError, TaylorSeer, TaylorToCa, ToCa
from toca_compile.compiler.variants import ProgramVariants
from toca_compile.ir.actions import Action, Compute, Keep, Partial, Reuse
from toca_compile.ir.anchors import Ring
from toca_compile.ir.history import CacheSpec, History
from toca_compile.ir.plan import Plan
from toca_compile.ir.program import Form, Program
from toca_compile.ir.state import State
from toca_compile.ir.storage import TAIL
from toca_compile.policies import Anchors, ClusCa, Composition, Dmd, Foca, FreqCa, Rule, SpeCa

toca = torch.ops.toca
STEPS = 9
BYTE = "float8_e4m3fn"

POLICIES: dict[str, Any] = {
    "reuse": Fora(STEPS, 3),
    "rows": ToCa(STEPS, 3, 0.3, schedule="constant"),
    "rows and skipped blocks": DuCa(STEPS, 3, 0.3),
    "differences": TaylorSeer(STEPS, 3, 2),
    "differences of tokens": TaylorToCa(STEPS, 3, 1, 0.3, keys="update"),
    "rows beside a forecast": TaylorToCa(STEPS, 3, 1, 0.3, keys="keep", update=False),
    "clusters": ClusCa(STEPS, 4, 4, 0.3),
    "anchors": Composition(STEPS, rules=(Rule(Anchors(by=Foca())),)),
    "measured anchors": Composition(STEPS, rules=(Rule(Anchors(by=Dmd())),)),
    "blocks": BlockCache(STEPS, 1, interval=3, order=1, basis="newton"),
    "blocks in two bands": FreqCa(STEPS, 3),
    "blocks, verified": SpeCa(STEPS, threshold=1e3, decay=1.0),
    "blocks by a test": BlockCache(STEPS, threshold=2.0, order=1),
}


def run(opt: Any, after: Callable[[], None] = lambda: None) -> tuple[torch.Tensor, str]:
    """A sampling of few labels, with something done after each step; and the kinds of its steps."""
    opt.reset()
    x = noise()
    with torch.no_grad():
        for i in range(STEPS):
            x = x - opt(x, torch.full((2,), 900 - 100 * i), torch.arange(2))[:, :2] / STEPS
            after()
    return x, "".join(step.kind.value[0] for step in opt.steps)


def test_packed_caches_are_those_that_are_rounded_between_steps(traced: Traced) -> None:
    _, opt = traced(PlainDiT)
    for name, policy in POLICIES.items():
        check_packed(opt, policy, tables=name == "measured anchors")


def check_packed(opt: Any, policy: Any, tables: bool) -> None:
    """The oracle keeps whole numbers, and rounds what lies in each buffer when a step is done. ``tables``: a second
    buffer beside an output is one of weights."""
    dtype = getattr(torch, BYTE)

    def rounded() -> None:
        for (*_, kind, _, index), buffer in toca_compile.explain(opt).buffers.items():
            if kind.holds_values and not (tables and (kind, index) == (State.HISTORY, 2)):
                buffer.copy_(toca.unpack(toca.pack(buffer, dtype, TAIL), dtype, TAIL, buffer.dtype))

    opt.policy = policy
    meant, does = run(opt, rounded)
    held: list[int] = []
    exact, _ = run(opt, lambda: held.append(opt.cache_bytes))
    opt.policy = replace(policy, cache_dtype=BYTE)
    packed, did = run(opt, lambda: held.append(opt.cache_bytes))
    assert did == does
    torch.testing.assert_close(packed, meant, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed, exact, rtol=1e-6, atol=1e-6), does
    whole, byte = max(held[:STEPS]), max(held[STEPS:])
    # A row of 16 bytes and as many for its exponent, where there were 64; what ranks tokens is as it was.
    assert byte < 0.7 * whole
    assert byte == toca_compile.explain(opt).cache_bytes


@pytest.mark.parametrize("policy", [POLICIES["rows"], POLICIES["differences"], POLICIES["blocks"]], ids=str)
def test_a_row_of_any_size_is_kept(traced: Traced, policy: Any) -> None:
    """Without exponents numbers beyond 448 would be lost."""
    net, opt = traced(PlainDiT, replace(policy, cache_dtype=BYTE))
    for block in net.blocks:
        block.proj.weight.data *= 1e4
    assert run(opt)[0].isfinite().all()


def test_elsewhere_is_where_the_model_is(traced: Traced) -> None:
    """On the device that the model is on already, nothing is copied."""
    _, opt = traced(PlainDiT, POLICIES["rows"])
    plain, _ = run(opt)
    opt.policy = replace(POLICIES["rows"], cache_device="cpu")
    assert torch.equal(run(opt)[0], plain)


def built(program: Program, does: Action, history: History) -> list[str]:
    """The calls of the variant of the first branches, of which the second does this, that touch buffers of values."""
    segment = next(s for s in program.segments if s.sites)
    first, second = Form(Reuse(), Keep(CacheSpec())), Form(does, does.touches(Keep(history, stamp=True)))
    variant = ProgramVariants(program, lambda *_: None, dense=False).build(segment, (first, second), Plan(()))  # type: ignore[arg-type, return-value]
    told = [
        f"{node.name} = {node.target.__name__.split('.')[0]}({', '.join(map(str, node.args))})"
        for node in variant.module.graph.nodes
        if node.op == "call_function"
    ]
    return [line for line in told if "pack" in line or "copy" in line or "store" in line]


def test_what_is_only_written_is_not_read(program: Program) -> None:
    byte = torch.float8_e5m2
    assert built(program, Compute(), CacheSpec(dtype=byte)) == [
        "pack_default = pack(linear_2, torch.float8_e5m2, 16)",
        "store__default = store_(cache1, pack_default)",
    ]
    ring = built(program, Compute(), Ring(3, byte, Foca()))
    assert [line for line in ring if "history" in line] == [
        "store_at__default = store_at_(history1_1, keep1, pack_default)"
    ]


def test_another_device_is_copied_from_and_to(program: Program) -> None:
    """What is computed lies here; what is kept on a device of which nothing more can be asked."""
    assert built(program, Partial(), CacheSpec(device="meta")) == [
        "_to_copy_default = _to_copy(cache1)",
        "scatter_tokens__default = scatter_tokens_(_to_copy_default, select_tokens_default, linear_2, 1, 0)",
        "store__default = store_(cache1, _to_copy_default)",
    ]
    assert built(program, Reuse(), CacheSpec(dtype=torch.float8_e5m2, device="meta")) == [
        "_to_copy_default = _to_copy(cache1)",
        "unpack_default = unpack(_to_copy_default, torch.float8_e5m2, 16, torch.float32)",
        "mul = mul(in7_arg9_1, unpack_default)",
    ]


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    net = randomize(PlainDiT())
    own = toca_compile.optimize(net, Fora(4, 2, cache_device="xpu:7"), lowering="eager")
    with pytest.raises(PolicyError, match="cache_device: nothing can lie on 'xpu:7'"):
        sample(own, 2, noise())
    for wrong in ("meta", "gpu", 3):
        with pytest.raises(PolicyError, match="cache_device must be the name of a device"):
            Fora(4, 2, cache_device=wrong)  # type: ignore[arg-type]
