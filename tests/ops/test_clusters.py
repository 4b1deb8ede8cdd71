"""Clusters against their definitions, in any layout."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles.clusca import k_means
from toca_compile.ops import clusters, rows, scores

LAYOUTS = {
    "tokens first": (lambda x: x.transpose(0, 1), (0, 1)),
    "batch first": (lambda x: x, (1, 0)),
    "features between": (lambda x: x.permute(0, 2, 1), (2, 0)),
    "two dimensions": (lambda x: x.unflatten(1, (2, -1)), (1, 0, 2)),
    "two, then the batch": (lambda x: x.transpose(0, 1).unflatten(0, (2, -1)), (0, 2, 2)),
    "samples and tokens in one": (lambda x: x.flatten(0, 1), (0, 0)),
}


def drawn(batch: int, tokens: int, seed: int) -> Tensor:
    return scores.random_scores(torch.zeros(batch, tokens), 1, 2, seed)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 12), k=st.integers(2, 6), rounds=st.integers(1, 6), seed=st.integers(0, 999),
    layout=st.sampled_from(sorted(LAYOUTS)),
)  # fmt: skip
def test_k_means(n: int, k: int, rounds: int, seed: int, layout: str) -> None:
    """Of each sample alone, however it lies."""
    n, k = 2 * n, min(k, 2 * n - 1)
    g = torch.Generator().manual_seed(seed)
    points = 5 * torch.randn(3, 1, 4, generator=g) + torch.randn(3, n, 4, generator=g)
    order = drawn(3, n, seed)
    bits = [[round(float(v) * 2**24) for v in row] for row in order]
    lay, places = LAYOUTS[layout]
    actual = clusters.cluster_tokens(lay(points).contiguous(), order, k, rounds, *places)
    assert actual.dtype == torch.int32
    expected = [k_means(p, k, rounds, o) for p, o in zip(points, bits, strict=True)]
    assume(all(margin > 1e-4 for _, margin in expected))  # what single precision can tell apart
    assert actual.tolist() == [labels for labels, _ in expected]


@settings(deadline=None, max_examples=40)
@given(kinds=st.integers(1, 4), k=st.integers(2, 6), rounds=st.integers(1, 6), seed=st.integers(0, 999))
def test_equal_tokens_are_of_one_cluster(kinds: int, k: int, rounds: int, seed: int) -> None:
    """Then some cluster has no token, and its centre stays a number."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, kinds, (2, 12), generator=g)
    points = torch.randn(2, kinds, 4, generator=g).gather(1, kind[..., None].expand(-1, -1, 4))
    found = clusters.cluster_tokens(points, drawn(2, 12, seed), k, rounds, 1, 0)
    assert ((found >= 0) & (found < k)).all()
    for own, labels in zip(kind.tolist(), found.tolist(), strict=True):
        assert len(set(zip(own, labels, strict=True))) == len(set(own))


def test_what_is_no_number_has_a_cluster() -> None:
    x = torch.full((1, 6, 3), float("nan"))
    found = clusters.cluster_tokens(x, drawn(1, 6, 0), 3, 4, 1, 0)
    assert ((found >= 0) & (found < 3)).all()


@settings(deadline=None, max_examples=100)
@given(n=st.integers(2, 40), k=st.integers(2, 12), more=st.integers(-3, 3), seed=st.integers(0, 9999))
def test_one_token_of_each_cluster_and_its_proxies(n: int, k: int, more: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, k, (2, n), generator=g, dtype=torch.int32)
    order, count = drawn(2, n, seed), max(1, min(n, k + more))
    index = clusters.pick_tokens(label, order, k, count)
    proxy = clusters.proxies(label, index, k)
    assert index.shape == (2, count)
    for labels, keys, own, told in zip(label.tolist(), order.tolist(), index.tolist(), proxy.tolist(), strict=True):
        ranked = sorted(range(n), key=lambda i, keys=keys: (-keys[i], i))
        firsts = [i for j, i in enumerate(ranked) if labels[i] not in {labels[e] for e in ranked[:j]}]
        assert sorted(own) == sorted([*firsts, *(i for i in ranked if i not in firsts)][:count])
        for i, j in enumerate(told):
            if i in own or labels[i] not in {labels[e] for e in own}:
                assert j == i
            else:
                assert j in own
                assert labels[j] == labels[i]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), share=st.floats(0, 1), layout=st.sampled_from(sorted(LAYOUTS)))
def test_rows_go_a_share_of_the_way(seed: int, share: float, layout: str) -> None:
    g = torch.Generator().manual_seed(seed)
    value, proxy = torch.randn(3, 8, 5, generator=g), torch.randint(0, 8, (3, 8), generator=g)
    lay, places = LAYOUTS[layout]
    laid = lay(value).contiguous()
    moved = rows.shift_(laid.clone(), clusters.drawn_to(laid, proxy, share, *places))
    expected = share * value.gather(1, proxy[..., None].expand(-1, -1, 5)) + (1 - share) * value
    torch.testing.assert_close(moved, lay(expected))


def test_a_double_stays_one_and_half_precision_is_summed_in_single() -> None:
    value, proxy = torch.randn(1, 4, 3, dtype=torch.float64), torch.tensor([[1, 1, 3, 3]])
    exact = rows.shift_(value.clone(), clusters.drawn_to(value, proxy, 1.0, 1, 0))
    torch.testing.assert_close(exact, value[:, [1, 1, 3, 3]], rtol=0, atol=1e-15)
    half = value.bfloat16()
    assert clusters.drawn_to(half, proxy, 0.5, 1, 0).dtype == torch.float32
    assert rows.shift_(half.clone(), torch.zeros_like(value)).equal(half)
