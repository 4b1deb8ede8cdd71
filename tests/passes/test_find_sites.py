"""FindSites: residual branches, and what each may do."""

from expecttest import assert_expected_inline

import toca_compile
from tests.models import Mixing, randomize
from tests.sampling import noise, sample
from toca_compile import ToCa
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
