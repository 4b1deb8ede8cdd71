"""What the fuzzer found, each as small as it could be made."""

from typing import Any

import pytest
import torch

import toca_compile
from tests.fuzz.grammar import Attention, Block, Branch, Spec
from tests.fuzz.models import build, inputs
from tests.fuzz.oracles import Tally, examine
from toca_compile import BlockCache, Fora, FullCompute, TaylorToCa, ToCa
from toca_compile.policies import Composition, Every, Queries, Rule, Selector, Share, SkipBlocks

SOME = ToCa(6, 3, 0.4, "constant")
JOINT = Composition(
    2, Every(2), (Rule(Queries("keep"), ("joint_attention",)),), which=Selector("random"), how_many=Share(0.5)
)  # fmt: skip

FINDS: dict[str, tuple[Spec, list[Any]]] = {
    "a shift of each frame, which is added to what is normed and scaled, is no branch of a stream": (
        Spec((Block((Branch(modulation="frame", add="alpha"), Branch(before="attends", add="scaled"))),)),
        [Fora(4, 3)],
    ),
    "a product without a bias of what is half already, in an autocast": (
        Spec((Block((Branch(inside="squeeze", island="autocast"), Branch("attention"))),)),
        [FullCompute()],
    ),
    "a convolution of what is half already, in an autocast": (
        Spec((Block((Branch("attention", inside="conv2d", island="autocast"),)),)),
        [FullCompute()],
    ),
    "a convolution along the tokens in an autocast": (
        Spec((Block((Branch(body="conv", island="autocast"),)),)),
        [FullCompute(), SOME],
    ),
    "a single step inside a double model": (
        Spec((Block((Branch("attention", Attention(rope="complex"), modulation="block"),)),), height=2, channels=16, dtype="float64", registers=2),
        [Composition(4, rules=(Rule(Queries()),), how_many=Share(0.8))],
    ),
    "a template whose first block has one value at two inputs": (
        Spec((Block((Branch("attention", gate="block"),), skip="add"),) * 2),
        [FullCompute()],
    ),
    "a test at run time after branches of which only the second is of all tokens": (
        Spec(
            (Block((Branch("attention", Attention(scope="time")), Branch("cross"))),) * 2, frames=2, height=4, width=1,
            layout="bsfc", text="cross",
        ),
        [BlockCache(4, threshold=0.5)],
    ),
    "a flex attention in a checkpoint": (
        Spec((Block((Branch("attention", Attention("flex"), wrap="checkpoint"),)),)),
        [FullCompute(), TaylorToCa(3, 2, keys="fresh")],
    ),
    "queries of a flex attention in inference mode": (
        Spec((Block((Branch("attention", Attention("flex")),)),), inference_mode=True),
        [TaylorToCa(3, 2, keys="update")],
    ),
    "scores of samples for a branch that mixes the batch": (
        Spec((Block((Branch("attention"), Branch(inside="batch_flip"))),)),
        [SOME],
    ),
    "autocast inside the model": (
        Spec((Block((Branch("attention", Attention(mask="per_head"), island="autocast"),)),)),
        [FullCompute()],
    ),
    "cached keys of two streams in one attention": (Spec((Block(style="joint"),) * 2, text="joint"), [JOINT]),
    "policies of graphs behind a graph break": (
        Spec((Block((Branch("attention"),), breaks=True),)),
        [Fora(4, 2), SOME, Fora(4, 3)],
    ),
    "strides of a reused step in front of a graph break": (
        Spec(
            (Block((Branch("attention", add="reversed"),), breaks=True), Block((Branch("attention"),))),
            frames=4,
            layout="fbsc",
        ),
        [Fora(2)],
    ),
    "the entropy of kept keys": (
        Spec((Block(), Block((Branch("attention", Attention(keys="pooled"), inside="attends"),)))),
        [TaylorToCa(3, score="entropy", keys="keep")],
    ),
    "skipped blocks that a skip from before the first block enters": (
        Spec((Block(), Block((Branch("attention"),), skip="add"))),
        [BlockCache(4, interval=2), BlockCache(4, threshold=0.05)],
    ),
    "keys made across samples beside an MLP": (
        Spec((Block((Branch("attention"), Branch("fused", inside="roll_flat", on="k"))),)),
        [TaylorToCa(2, keys="update"), TaylorToCa(3, keys="fresh"), TaylorToCa(3, keys=None)],
    ),
    "queries turned about among samples beside an MLP": (
        Spec((Block((Branch("attention"), Branch("fused", inside="batch_flip", on="q"))),)),
        [TaylorToCa(2, keys="update")],
    ),
    "what follows from the time, laid out in another order of its dimensions": (
        Spec((Block((Branch("attention", Attention(scope="window"), modulation="token", gate="token", add="reversed"),
                     Branch(norm="manual", add="scaled"))),), layout="bcn", given="picture", given_text="copied", words=12),
        [FullCompute()],
    ),
    "scores where a later block mistakes tokens for samples": (
        Spec((Block((Branch("fused"),)), Block((Branch(inside="transposed"),)))),
        [Composition(2, Every(2), (Rule(Queries()),), which=Selector(score), how_many=Share(0.5))
         for score in ("v_norm", "k_norm", "attention", "entropy")],
    ),
}  # fmt: skip

# Mistakes of the fuzzer's own, seen as failures of the compiler.
MISTAKES: dict[str, tuple[Spec, list[Any]]] = {
    "skipped blocks that add to the stream in place": (
        Spec((Block(), Block((Branch("attention", add="in_place"),)))),
        [Composition(3, Every(3), alternate=(Rule(SkipBlocks(first=1)),)),
         Composition(3, Every(3), alternate=(Rule(SkipBlocks(first=1, residual=False)),))],
    ),
    "blocks that add in place to what skipped ones left": (
        Spec((Block(), Block((Branch("attention", add="in_place"),)))),
        [Composition(3, Every(3), (Rule(SkipBlocks(last=1, residual=False)),))],
    ),
    "a branch in two blocks, in the last of which nothing reads it": (
        Spec((Block((Branch(inside="swap"),), "joint"), Block()), text="joint", shared_weights=True),
        [Fora(2)],
    ),
    "autocast around an op with a vector": (Spec((Block((Branch(inside="lerp", island="autocast"),)),)), [FullCompute()]),
}  # fmt: skip


def test_a_norm_behind_skipped_blocks_is_computed() -> None:
    """What skipped blocks add is kept as it is before the norm of the stream that ends the last one."""
    spec = Spec((Block((Branch("attention"), Branch("swiglu", place="post"))),))
    policy = Composition(3, Every(3), alternate=(Rule(SkipBlocks()),))
    model: Any = build(spec)
    calls, entered, summed = inputs(spec, 3, False), [], []
    with torch.no_grad():
        opt = toca_compile.optimize(model, policy, lowering="eager")
        out = [opt(*given) for given in calls][2]
        block = model.blocks[0]
        block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        block.branches[1].norm.register_forward_pre_hook(lambda module, args: summed.append(args[0]))
        torch._dynamo.reset()
        model(*calls[0])
        model(*calls[2])
        stream = block.branches[1].norm(entered[1] + summed[0] - entered[0])
        torch.testing.assert_close(out, model.head(model.norm(stream)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FINDS)
def test_found_once(name: str) -> None:
    spec, policies = FINDS[name]
    assert examine(spec, policies) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_mistaken_once(name: str) -> None:
    spec, policies = MISTAKES[name]
    assert examine(spec, policies, tally := Tally()) == []
    skips = sum(isinstance(policy, Composition) for policy in policies)
    assert tally.applied["blend with skips"] == skips
