"""Scores and selection, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toca_compile.ops import scores, selection


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 300), keys=st.integers(1, 40), heads=st.integers(1, 3), seed=st.integers(0, 999),
    masked=st.sampled_from(["no", "bool", "float"]),
)  # fmt: skip
def test_attention_received_is_the_column_sum(n: int, keys: int, heads: int, seed: int, masked: str) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, heads, n, 4, generator=g), torch.randn(2, heads, keys, 4, generator=g)
    mask = None
    logits = q @ k.transpose(-1, -2) / 2
    if masked == "bool":
        mask = torch.rand(2, 1, 1, keys, generator=g) > 0.3
        mask[..., 0] = True
        logits = logits.masked_fill(~mask, float("-inf"))
    elif masked == "float":
        mask = torch.randn(1, 1, n, keys, generator=g)
        logits = logits + mask
    expected = logits.softmax(-1).sum(-2)
    torch.testing.assert_close(scores.attention_received(q, k, mask, None, False, 1), expected, rtol=1e-4, atol=1e-4)


def test_attention_received_causal_and_grouped() -> None:
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    full = k.repeat_interleave(2, 1)
    logits = (q @ full.transpose(-1, -2)) * 0.7
    logits = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(scores.attention_received(q, k, None, 0.7, True, 1), logits.softmax(-1).sum(-2))


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_a_stride_asks_every_so_many_rows(stride: int) -> None:
    q, k = torch.randn(2, 2, 50, 4), torch.randn(2, 2, 20, 4)
    expected = (q[:, :, ::stride] @ k.transpose(-1, -2) / 2).softmax(-1).sum(-2)
    torch.testing.assert_close(scores.attention_received(q, k, None, None, False, stride), expected)


def test_no_map_of_all_queries_is_made() -> None:
    """The largest value alive while scoring n queries is a block of rows, not n × n."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    q = torch.randn(1, 1, 2048, 4)
    with Largest() as seen:
        scores.attention_received(q, q, None, None, False, 1)
    assert seen.size <= 2048 * 2048 // 16


def select(score: torch.Tensor, k: int, **kwargs: object) -> torch.Tensor:
    settings_ = {"step": 1, "since": 0, "weight": 0.0, "grid": [], "cell": 1, "bonus": 0.0, **kwargs}
    stamp = settings_.pop("stamp", torch.zeros(score.shape, dtype=torch.int32))
    return selection.select_tokens(score, stamp, k, **settings_).sort(1).values  # type: ignore[arg-type]


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=40), st.data())
def test_selection_is_the_stable_top_k(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    score = torch.tensor([values]) + 0.0  # no negative zeros
    expected = score.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    assert torch.equal(select(score, k), expected)


def test_ties_go_to_the_first_tokens() -> None:
    assert select(torch.ones(2, 9), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_age_raises_the_score() -> None:
    stamp = torch.tensor([[5, 0, 3, 0]], dtype=torch.int32)
    # Step 7 after a full step 2: token 0 was refreshed at 5, token 2 at 3, the others with the full step.
    score = torch.zeros(1, 4)
    assert select(score, 2, stamp=stamp, step=7, since=2, weight=1.0).tolist() == [[1, 3]]
    assert select(score, 3, stamp=stamp, step=7, since=2, weight=1.0).tolist() == [[1, 2, 3]]


def test_the_bonus_goes_to_the_best_of_each_cell() -> None:
    # A 3×5 picture behind one register, cells of 2: those at the right and lower border are smaller.
    picture = torch.tensor([[9.0, 1, 1, 1, 2], [1, 8.9, 1, 7, 1], [3, 1, 1, 6, 5]])
    score = torch.cat([torch.tensor([100.0]), picture.flatten()])[None]
    raised = selection._cell_bonus(score, [3, 5, 1, 1], 2, 0.5)
    best = {(0, 0): 13.5, (1, 3): 10.5, (0, 4): 3.0, (2, 0): 4.5, (2, 3): 9.0, (2, 4): 7.5}
    expected = picture.clone()
    for place, value in best.items():
        expected[place] = value
    assert torch.equal(raised[0, 1:].reshape(3, 5), expected)
    assert raised[0, 0] == 100


def test_random_scores_are_uniform_reproducible_and_the_same_for_every_sample() -> None:
    like = torch.zeros(3, 4096, dtype=torch.int32)
    a, b, c = (scores.random_scores(like, step, site, 0) for step, site in ((1, 2), (1, 2), (2, 2)))
    assert torch.equal(a, b)
    assert torch.equal(a[0], a[2])
    assert not torch.equal(a, c)
    assert 0 <= a.min()
    assert a.max() < 1
    assert abs(a[0].mean() - 0.5) < 0.02
    assert abs(a[0].std() - 12**-0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([a[0], c[0]]))[0, 1]) < 0.05
