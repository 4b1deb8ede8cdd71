"""Scores of tokens, float32 ``[batch, tokens]``. None keeps an n×n map."""

import torch
from torch import Tensor

from toca_compile.ops.registry import op
from toca_compile.ops.rows import by_token

_SCORE_BLOCK = 128  # query rows of the attention map alive at a time: at 1024 tokens they stay in the cache of a CPU
_SCORE_MAP = 2**26  # numbers of the map alive at a time elsewhere, where a block costs launches
_SCORE_BLOCKS = 16  # at most, so that the unrolled graph stays small at high resolution


@op("token_norm(Tensor x, int dim, int batch_dim, int span=1) -> Tensor")
def token_norm(x: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """‖x‖₂ of each token's features, as ``by_token`` lays them out."""
    return by_token(x, dim, batch_dim, span).norm(dim=-1)


@op("attention_received(Tensor query, Tensor key, Tensor? mask, float? scale, bool causal, int stride) -> Tensor")
def attention_received(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, causal: bool, stride: int
) -> Tensor:
    """Attention that each key receives: column sums of the post-softmax map (s1 of ToCa, section 3.2).

    The map is made a block of query rows at a time and summed at once. With ``stride`` r only every r-th query row
    is asked, an estimate from n/r rows.

    Args:
        query: ``[..., heads, queries, d]``.
        key: ``[..., heads, keys, d]`` (fewer heads are repeated).

    Returns:
        float32 ``[..., heads, keys]``.
    """
    total: Tensor | None = None
    for rows in _blocks(query, key, stride):
        received = _map_rows(query, key, mask, scale, causal, rows).sum(-2)
        total = received if total is None else total + received
    assert total is not None
    return total


@op("attention_entropy(Tensor query, Tensor key, Tensor? mask, float? scale, bool causal, float epsilon) -> Tensor")
def attention_entropy(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, causal: bool, epsilon: float
) -> Tensor:
    """Entropy of each query's row of the post-softmax map, mean over heads: −Σ p·ln(p + ε) (s2 of ToCa, section 3.2).

    The map is made a block of rows at a time.

    Args:
        query: ``[batch, heads, queries, d]``.
        key: ``[batch, heads, keys, d]`` (fewer heads are repeated).
        mask: broadcasts to ``[batch, heads, queries, keys]``.

    Returns:
        float32 ``[batch, queries]``, in nats.
    """
    parts = [row_entropy(_map_rows(query, key, mask, scale, causal, rows), epsilon) for rows in _blocks(query, key, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@op("row_entropy(Tensor weights, float epsilon) -> Tensor")
def row_entropy(weights: Tensor, epsilon: float) -> Tensor:
    """−Σ p·ln(p + ε) of the head-mean rows: ``[batch, heads, queries, keys]`` to float32 ``[batch, queries]``."""
    mean = weights.float().mean(1)
    return -(mean * (mean + epsilon).log()).sum(-1)


@op("pair_mean(Tensor score) -> Tensor")
def pair_mean(score: Tensor) -> Tensor:
    """The mean of both halves of a batch, for both: ``[batch, tokens]`` to the same. An odd batch is no pair."""
    if score.shape[0] % 2:
        return score
    first, second = score.chunk(2)
    return ((first + second) / 2).repeat(2, 1)


def _blocks(query: Tensor, key: Tensor, stride: int) -> list[slice]:
    """Every ``stride``-th query row, in blocks. How many rows a partial step has is open when it is traced: one
    block."""
    queries, keys = query.shape[-2], key.shape[-2]
    if not isinstance(queries, int):
        return [slice(None, None, stride)]
    rows = range(0, queries, stride)
    fit = _SCORE_BLOCK if query.device.type == "cpu" else _SCORE_MAP // (query.shape[:-2].numel() * keys)
    block = max(fit, -(-len(rows) // _SCORE_BLOCKS))
    parts = [rows[first : first + block] for first in range(0, len(rows), block)]
    return [slice(part.start, part[-1] + 1, stride) for part in parts]


def _map_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, causal: bool, rows: slice
) -> Tensor:
    """Some rows of the post-softmax map, in float32."""
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    keys = key.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query[..., rows, :] * scale) @ key.transpose(-1, -2)
    logits = logits.float()
    if causal:
        at = torch.arange(query.shape[-2], device=query.device)[rows]
        hidden = torch.arange(keys, device=query.device)[None, :] > at[:, None]
        logits = logits.masked_fill(hidden, float("-inf"))
    if mask is not None:
        # Inside a trace a size may be symbolic; one row stands for all.
        shared = mask.dim() < 2 or (isinstance(mask.shape[-2], int) and mask.shape[-2] == 1)
        part = mask if shared else mask[..., rows, :]
        logits = logits.masked_fill(~part, float("-inf")) if mask.dtype == torch.bool else logits + part
    return logits.softmax(-1)


@op("row_norm(Tensor x, bool negate) -> Tensor")
def row_norm(x: Tensor, negate: bool) -> Tensor:
    """‖x‖₂ of each row, or 1 − ‖x‖₂ (V-norm score: small values are refreshed; DuCa, section 3.3).

    Args:
        x: ``[..., tokens, d]``.

    Returns:
        float32 ``[..., tokens]``.
    """
    norm = x.float().norm(dim=-1)
    return 1 - norm if negate else norm


@op("unit_scores(Tensor score) -> Tensor")
def unit_scores(score: Tensor) -> Tensor:
    """L2-normalised over the tokens of each sample: ``[batch, tokens]`` to the same."""
    return torch.nn.functional.normalize(score.float(), dim=-1)


@op("random_scores(Tensor like, SymInt step, SymInt site, int seed) -> Tensor")
def random_scores(like: Tensor, step: int, site: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1) for each token, a function of step, site and token alone: the same in every run, and
    the same for a sample whatever its batch mates are. ``like`` gives shape ``[batch, tokens]`` and device."""
    # Masked, or Inductor takes the products for places in memory, which it numbers with 32 bits on a GPU.
    x = torch.arange(like.shape[1], device=like.device, dtype=torch.int64) & 0xFFFFFFFF
    x = x * 0x9E3779B1 + (step + 1) * 0x85EBCA77 + (site + 1) * 0xC2B2AE3D + (seed + 1) * 0x27D4EB2F
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) & 0xFFFFFFFF) * multiplier
    x = (x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> 15)
    # 24 bits: what a float32 can hold, so that no two values meet by rounding to 1.0.
    return ((x & 0xFFFFFFFF) >> 8).to(torch.float32).mul(2.0**-24).expand(like.shape[0], -1)
