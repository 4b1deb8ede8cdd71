"""Clusters: what a full step keeps of them, and a partial one makes of it."""

import pytest

from tests.programs import REUSED, ROWS, variant_of
from toca_compile.ir.actions import Compute, Keep, Partial
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Form, Program
from toca_compile.policies import Clusters

CLUSTERED = Form(Compute(), Keep(CacheSpec(), score=1))
TOKENWISE = Form(Partial(), Keep(CacheSpec(1), tokenwise=True))
ALONE = Form(Partial(update=False), Keep(CacheSpec()))


def text(program: Program, *forms: Form, gamma: float = 0.25) -> str:
    return print_graph(variant_of(program, *forms, selector=Clusters(3, gamma, 2)).module.graph)


def test_they_are_found_among_what_enters_the_site(program: Program) -> None:
    told = text(program, REUSED, CLUSTERED)
    entered = program.sites[1].source.name
    assert f"toca.cluster_tokens({entered}, random_scores_default, 3, 2, 1, 0)" in told
    assert "toca.store_(score1, cluster_tokens_default)" in told


@pytest.mark.parametrize(
    ("form", "moved"), [(ROWS, ["scatter_tokens__default"]), (TOKENWISE, ["scatter_tokens__default", "cache1"]),
                        (ALONE, ["scatter_tokens__default"])],
    ids=["kept", "with histories", "alone"],
)  # fmt: skip
def test_what_is_computed_moves_what_is_not(program: Program, form: Form, moved: list[str]) -> None:
    """Where tokens have histories, the value that they start from too."""
    told = text(program, REUSED, form)
    assert "toca.pick_tokens(score1, random_scores_default, 3, k1)" in told
    assert "toca.mark_fresh_(stamp1, pick_tokens_default, step1)" in told
    assert "toca.drawn_to(scatter_tokens__default, proxies_default, 0.25, 1, 0)" in told
    assert [line.split("shift_(")[1].split(",")[0] for line in told.splitlines() if "toca.shift_(" in line] == moved


def test_no_share_is_no_op(program: Program) -> None:
    told = text(program, REUSED, ROWS, gamma=0.0)
    assert "pick_tokens" in told
    assert "proxies" not in told
    assert "shift_" not in told
