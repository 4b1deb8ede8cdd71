"""The attention that tells the columns of its map, on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from toca_compile.kernels.attention import attention

toca = torch.ops.toca


def operands(*sizes: int, queries: int, keys: int, of_value: int) -> list[Tensor]:
    """Query, key and value ``[batch, heads, tokens, d]``, each laid out in another way."""
    batch, heads, size = sizes
    query = torch.randn(batch, queries, heads, size).transpose(1, 2)
    key = torch.randn(batch, heads, keys, size)
    value = torch.randn(batch, keys, heads, 2 * of_value).transpose(1, 2)[..., of_value:]
    return [query, key, value]


def check(operands: list[Tensor], scale: float, stride: int) -> None:
    query, key, value = operands
    out, received = attention(query, key, value, scale, stride)
    rows = (query.double() @ key.double().mT * scale).softmax(-1)
    torch.testing.assert_close(out, (rows @ value.double()).float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(received, rows[..., ::stride, :].sum(-2).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.inductor
@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), queries=st.integers(1, 300), keys=st.integers(1, 70),
    size=st.integers(1, 20), of_value=st.integers(1, 20), stride=st.integers(1, 5), seed=st.integers(0, 999),
)  # fmt: skip
def test_it_is_the_attention_and_its_columns(
    batch: int, heads: int, queries: int, keys: int, size: int, of_value: int, stride: int, seed: int
) -> None:
    torch.manual_seed(seed)
    check(operands(batch, heads, size, queries=queries, keys=keys, of_value=of_value), 0.4, stride)


@pytest.mark.inductor
def test_a_long_map_is_made_in_blocks_of_few_rows() -> None:
    check(operands(1, 1, 8, queries=50, keys=30_000, of_value=8), 0.35, 3)


@pytest.mark.inductor
@pytest.mark.parametrize("queries", [2, 7, 500])
def test_several_threads_may_share_a_head(queries: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(operands(1, 2, 8, queries=queries, keys=40, of_value=8), 0.35, 2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("dtype", "causal", "fused"),
    [(torch.float32, False, True), (torch.bfloat16, False, False), (torch.float32, True, False)],
)
def test_where_it_is_taken(dtype: torch.dtype, causal: bool, fused: bool) -> None:
    query, key, value = (x.to(dtype) for x in operands(1, 2, 8, queries=9, keys=9, of_value=8))

    def both(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return toca.attention_and_received(query, key, value, None, causal, None, 1)  # type: ignore[no-any-return]

    traced = make_fx(both)(query, key, value)
    found = any(node.target is toca.attention_by_rows.default for node in traced.graph.nodes)
    assert found is fused
    for ours, wanted in zip(traced(query, key, value), both(query.float(), key.float(), value.float()), strict=True):
        torch.testing.assert_close(ours.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.inductor
@pytest.mark.parametrize("keys", [1, 9])
@pytest.mark.parametrize("shared", ["keys", "values", "both"])
def test_samples_and_heads_may_be_one_for_all(shared: str, keys: int) -> None:
    query, key, value = operands(2, 3, 8, queries=9, keys=keys, of_value=8)
    key = key[:1] if shared != "values" else key
    value = value[:, :1] if shared != "keys" else value
    out, received = toca.attention_and_received(query, key, value, None, False, None, 1)
    rows = (query @ key.mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(out, rows @ value)
    torch.testing.assert_close(received, rows.sum(-2))


@pytest.mark.parametrize(("samples", "keys"), [(0, 4), (2, 0)])
def test_nothing_to_attend(samples: int, keys: int) -> None:
    query, key, value = (torch.ones(samples, 1, n, 8) for n in (3, keys, keys))
    out, received = toca.attention_and_received(query, key, value, None, False, None, 1)
    assert (out.shape, received.shape) == ((samples, 1, 3, 8), (samples, 1, keys))
