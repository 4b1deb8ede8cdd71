"""FindSites: residual branches, and what each may do."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import toca_compile
from tests.models import Mixing, PlainBlock, PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import BlockCache, Fora, FullCompute, ToCa
from toca_compile.ir.actions import legal_actions
from toca_compile.ir.program import Program


def test_find_sites(program: Program) -> None:
    lines = [
        f"{s.index} {s.kind} axis={s.axis.size} grid={s.axis.grid} {s.source}..{s.output} -> {s.add} "
        f"score={s.score_by_keys and s.score_by_keys.site} block={s.block} depth={s.depth}/{s.depths} actions={sorted(legal_actions(s))}"
        for s in program.sites
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
0 self_attention axis=6 grid=(2, 3) transpose..squeeze -> add score=0 block=0 depth=0/2 actions=['compute', 'forecast', 'queries', 'reuse', 'skip']
1 mlp axis=6 grid=(2, 3) add..linear_2 -> add_1 score=0 block=0 depth=0/2 actions=['compute', 'forecast', 'partial', 'reuse', 'skip']
2 self_attention axis=6 grid=(2, 3) add_1..squeeze_1 -> add_2 score=2 block=1 depth=1/2 actions=['compute', 'forecast', 'queries', 'reuse', 'skip']
3 mlp axis=6 grid=(2, 3) add_2..linear_5 -> add_3 score=2 block=1 depth=1/2 actions=['compute', 'forecast', 'partial', 'reuse', 'skip']""",
    )


def test_a_branch_that_mixes_tokens_is_never_partial() -> None:
    model = randomize(Mixing())
    opt = toca_compile.optimize(model, ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant"), lowering="eager")
    sample(opt, 4, noise())
    assert not any("partial" in s.actions for s in toca_compile.explain(opt).sites)
    assert "cumsum" in str(toca_compile.explain(opt).sites[1].reason)


class HalfBlock(PlainBlock):
    """Its stream is bfloat16, and what a branch adds is added in float32, as video models do."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        y = (self.norm1(x.float()) * (1 + scale1) + shift1).type_as(x)
        x = (x.float() + self.attention(y) * gate1).type_as(x)
        y = (self.norm2(x.float()) * (1 + scale2) + shift2).type_as(x)
        return (x.float() + self.mlp(y) * gate2).type_as(x)


def test_a_stream_that_is_cast_for_each_addition(caplog: pytest.LogCaptureFixture) -> None:
    model = PlainDiT()
    model.blocks = nn.ModuleList(HalfBlock(16, 2) for _ in range(3))
    randomize(model).bfloat16()
    x, t, y = noise().bfloat16(), torch.full((2,), 500), torch.arange(2)
    with torch.no_grad():
        plain = model(x, t, y)
        opt = toca_compile.optimize(model, FullCompute(), lowering="eager")
        assert torch.equal(opt(x, t, y), plain)
        for policy in (Fora(4, 4), BlockCache(4, first=1, interval=4)):
            opt.policy = policy
            for _ in range(4):  # the same inputs: what is kept is what would be computed
                torch.testing.assert_close(opt(x, t, y), plain, rtol=2e-2, atol=2e-2)
        assert opt.steps[-1].kind.value == "skip"
    assert [s.kind for s in toca_compile.explain(opt).sites] == ["self_attention", "mlp"] * 3
    assert not [r for r in caplog.records if "joined between the blocks" in r.getMessage()]
