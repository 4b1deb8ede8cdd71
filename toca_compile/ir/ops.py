"""The ``toca::`` ops: what a rewritten graph does beside the model's own arithmetic.

Each is a composite of ATen ops, so it runs as it is in an eager graph, and Inductor sees through it and fuses it. Token
scores are float32 ``[batch, tokens]``; indices are int64 ``[batch, k]``. None of them reads a device value on the host,
and none keeps an n×n map.
"""

from collections.abc import Callable
from math import factorial

import torch
from torch import Tensor

_LIB = torch.library.Library("toca", "DEF")
_SCORE_BLOCK = 128  # query rows of the attention map alive at a time: at 1024 tokens they stay in the cache of a CPU
_SCORE_BLOCKS = 16  # at most, so that the unrolled graph stays small at high resolution


def _define(schema: str, fn: Callable[..., Tensor]) -> None:
    _LIB.define(schema)
    _LIB.impl(schema.split("(")[0], fn, "CompositeImplicitAutograd")


def gather_tokens(x: Tensor, index: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """Rows ``index[b]`` of ``x`` along ``dim``, each sample its own.

    Args:
        x: any rank; ``x.shape[batch_dim]`` is the batch.
        index: int64 ``[batch, k]``.
        dim: token dimension of ``x``, the first of ``span`` (frames and patches), which become one.
        batch_dim: batch dimension of ``x``; −1 where it has none (then ``index`` is ``[1, k]``).
    """
    x, batch_dim = _merged(x, dim, batch_dim, span)
    return x.gather(dim, _spread(index, x, dim, batch_dim))


def scatter_tokens_(cache: Tensor, index: Tensor, rows: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """Write ``rows`` to the places ``index`` of ``cache`` (contiguous), in place; returns ``cache``."""
    flat, batch_dim = _merged(cache, dim, batch_dim, span)
    flat.scatter_(dim, _spread(index, flat, dim, batch_dim), rows.to(cache.dtype))
    return cache


def blend_tokens_(cache: Tensor, index: Tensor, dense: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """As ``scatter_tokens_``, from a value computed for all tokens: the plain meaning of a partial step."""
    flat, batch_dim = _merged(cache, dim, batch_dim, span)
    chosen = torch.zeros(index.shape[0], flat.shape[dim], dtype=torch.bool, device=cache.device)
    chosen = chosen.scatter(1, index, True)
    chosen = chosen if batch_dim < dim else chosen.t()
    shape = [1] * flat.dim()
    shape[dim] = flat.shape[dim]
    if batch_dim >= 0:
        shape[batch_dim] = flat.shape[batch_dim]
    flat.copy_(torch.where(chosen.reshape(shape), dense.reshape(flat.shape), flat))
    return cache


def _merged(x: Tensor, dim: int, batch_dim: int, span: int) -> tuple[Tensor, int]:
    """``x`` with its token dimensions as one, and where its batch then is."""
    if span == 1:
        return x, batch_dim
    return x.flatten(dim, dim + span - 1), batch_dim - (span - 1 if batch_dim > dim else 0)


def _spread(index: Tensor, like: Tensor, dim: int, batch_dim: int) -> Tensor:
    """``index`` with the rank of ``like``, expanded over every other dimension."""
    view = [1] * like.dim()
    if batch_dim >= 0:
        view[batch_dim] = index.shape[0]
    view[dim] = index.shape[1]
    full = list(like.shape)
    full[dim] = index.shape[1]
    laid = index if batch_dim < dim else index.t()
    return laid.reshape(view).expand(full)


def store_(cache: Tensor, value: Tensor) -> Tensor:
    """Keep ``value``: copy it into ``cache`` in place; returns ``cache``."""
    return cache.copy_(value)


def difference(new: Tensor, old: Tensor, steps: int) -> Tensor:
    """(new − old) / steps in float32: the slope of a value between two full steps (TaylorSeer, section 3.2)."""
    return (new.float() - old.float()) / steps


def forecast(cache: Tensor, difference: Tensor, power: int, order: int) -> Tensor:
    """One more term of a series: cache + difference · power / order!. In a Taylor series ``power`` is xᵒʳᵈᵉʳ for x
    steps since the last full one; Newton's polynomial has the product of the distances to the full steps, and order
    0."""
    return cache.float() + difference.float() * power / factorial(order)


def token_age(stamp: Tensor, since: int, step: int) -> Tensor:
    """Steps since each token was last computed: alone (``stamp``, int32 ``[batch, tokens]``) or with all
    (``since``)."""
    return step - stamp.clamp(min=since)


def difference_tokens(new: Tensor, old: Tensor, age: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """As ``difference``, each token over its own age ``[batch, tokens]``."""
    return (new.float() - old.float()) / _laid(age, new, dim, batch_dim, span)


def forecast_tokens(
    cache: Tensor, difference: Tensor, age: Tensor, used: int, order: int, dim: int, batch_dim: int, span: int = 1
) -> Tensor:
    """As ``forecast`` in a Taylor series, each token from its own age; ``used`` 0 leaves the term out."""
    factor = _laid(age, cache, dim, batch_dim, span).float() ** order * used / factorial(order)
    return cache.float() + difference.float() * factor


def _laid(age: Tensor, like: Tensor, dim: int, batch_dim: int, span: int) -> Tensor:
    """``[batch, tokens]`` with the rank of ``like``, whose tokens lie in ``span`` dimensions from ``dim`` on."""
    shape = [1] * like.dim()
    shape[dim : dim + span] = like.shape[dim : dim + span]
    if batch_dim >= 0:
        shape[batch_dim] = like.shape[batch_dim]
    return (age if batch_dim < dim else age.t()).reshape(shape)


def token_norm(x: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """‖x‖₂ of each token's features, whatever dimensions they lie in: float32 ``[batch, tokens]``."""
    x, batch_dim = _merged(x.float(), dim, batch_dim, span)
    front = x.movedim((batch_dim, dim), (0, 1)) if batch_dim >= 0 else x.movedim(dim, 0).unsqueeze(0)
    return front.flatten(2).norm(dim=-1)


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """mean|now − before| / mean|before|, a float32 scalar: what FirstBlockCache holds against its threshold."""
    old = before.float()
    return (now.float() - old).abs().mean() / old.abs().mean()


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
    for rows in _blocks(query.shape[-2], stride):
        received = _map_rows(query, key, mask, scale, causal, rows).sum(-2)
        total = received if total is None else total + received
    assert total is not None
    return total


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
    parts = [
        row_entropy(_map_rows(query, key, mask, scale, causal, rows), epsilon) for rows in _blocks(query.shape[-2], 1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def row_entropy(weights: Tensor, epsilon: float) -> Tensor:
    """−Σ p·ln(p + ε) of the head-mean rows: ``[batch, heads, queries, keys]`` to float32 ``[batch, queries]``."""
    mean = weights.float().mean(1)
    return -(mean * (mean + epsilon).log()).sum(-1)


def pair_mean(score: Tensor) -> Tensor:
    """The mean of both halves of a batch, for both: ``[batch, tokens]`` to the same. An odd batch is no pair."""
    if score.shape[0] % 2:
        return score
    first, second = score.chunk(2)
    return ((first + second) / 2).repeat(2, 1)


def _blocks(queries: int | torch.SymInt, stride: int) -> list[slice]:
    """Every ``stride``-th query row, in blocks. How many rows a partial step has is open when it is traced: one
    block."""
    if not isinstance(queries, int):
        return [slice(None, None, stride)]
    rows = range(0, queries, stride)
    block = max(_SCORE_BLOCK, -(-len(rows) // _SCORE_BLOCKS))
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


def row_norm(x: Tensor, negate: bool) -> Tensor:
    """‖x‖₂ of each row, or 1 − ‖x‖₂ (V-norm score: small values are refreshed; DuCa, section 3.3).

    Args:
        x: ``[..., tokens, d]``.

    Returns:
        float32 ``[..., tokens]``.
    """
    norm = x.float().norm(dim=-1)
    return 1 - norm if negate else norm


def unit_scores(score: Tensor) -> Tensor:
    """L2-normalised over the tokens of each sample: ``[batch, tokens]`` to the same."""
    return torch.nn.functional.normalize(score.float(), dim=-1)


def random_scores(like: Tensor, step: int, site: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1) for each token, a function of step, site and token alone: the same in every run, and
    the same for a sample whatever its batch mates are. ``like`` gives shape ``[batch, tokens]`` and device."""
    x = torch.arange(like.shape[1], device=like.device, dtype=torch.int64)
    x = x * 0x9E3779B1 + (step + 1) * 0x85EBCA77 + (site + 1) * 0xC2B2AE3D + (seed + 1) * 0x27D4EB2F
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) & 0xFFFFFFFF) * multiplier
    x = (x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> 15)
    # 24 bits: what a float32 can hold, so that no two values meet by rounding to 1.0.
    return ((x & 0xFFFFFFFF) >> 8).to(torch.float32).mul(2.0**-24).expand(like.shape[0], -1)


def select_tokens(
    base: Tensor,
    stamp: Tensor,
    k: int,
    step: int,
    since: int,
    weight: float,
    grid: list[int],
    cell: int,
    bonus: float,
) -> Tensor:
    """The ``k`` tokens to recompute, by S = base + weight · age, with a bonus for the best of each grid cell.

    ``age`` counts the steps that a token has missed (s3): since it was last selected (``stamp``, a step index) or the
    site last computed all (``since``). The best token of each ``cell`` × ``cell`` patch of the picture gets S·(1 +
    bonus) (s4); cells at the border of a grid that ``cell`` does not divide are smaller. Equal scores are taken in
    token order, so the selection is a function of its inputs.

    Args:
        base: float32 ``[batch, tokens]``.
        stamp: int32 ``[batch, tokens]``.
        weight: λ3 / interval.
        grid: height, width and first token of the picture, and how many there are; empty without a bonus.

    Returns:
        int64 ``[batch, k]``, in no particular order.
    """
    age = (step - 1 - since) - (stamp - since).clamp(min=0)
    score = base + weight * age.to(torch.float32)
    if grid and bonus:
        score = _cell_bonus(score, grid, cell, bonus)
    # A total order: score bits made monotonic, then the token's index. Top-k of distinct keys has one answer.
    bits = score.contiguous().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = torch.arange(score.shape[1] - 1, -1, -1, device=score.device, dtype=torch.int64)
    keys = bits.to(torch.int64) * (1 << 32) + order
    return keys.topk(k, dim=1, sorted=False).indices


def _cell_bonus(score: Tensor, grid: list[int], cell: int, bonus: float) -> Tensor:
    height, width, offset, frames = grid
    samples, end = score.shape[0], offset + frames * height * width
    batch = samples * frames
    rows, columns = -(-height // cell), -(-width // cell)
    picture = score[:, offset:end].reshape(batch, height, width)
    padded = torch.nn.functional.pad(picture, (0, columns * cell - width, 0, rows * cell - height), value=float("-inf"))
    cells = padded.reshape(batch, rows, cell, columns, cell).permute(0, 1, 3, 2, 4).reshape(batch, -1, cell * cell)
    best = cells.argmax(-1, keepdim=True) == torch.arange(cell * cell, device=score.device)
    raised = torch.where(best, cells + cells * bonus, cells)
    raised = raised.reshape(batch, rows, columns, cell, cell).permute(0, 1, 3, 2, 4)
    raised = raised.reshape(batch, rows * cell, columns * cell)[:, :height, :width].reshape(samples, -1)
    before, after = score[:, :offset], score[:, end:]
    return torch.cat([before, raised, after], dim=1)


def mark_fresh_(stamp: Tensor, index: Tensor, step: int) -> Tensor:
    """Note that the tokens ``index`` were recomputed in ``step``, in place."""
    now = torch.zeros(index.shape, dtype=stamp.dtype, device=stamp.device) + step
    return stamp.scatter_(1, index, now)


_define("gather_tokens(Tensor x, Tensor index, int dim, int batch_dim, int span=1) -> Tensor", gather_tokens)
_define(
    "scatter_tokens_(Tensor(a!) cache, Tensor index, Tensor rows, int dim, int batch_dim, int span=1) -> Tensor(a!)",
    scatter_tokens_,
)
_define(
    "blend_tokens_(Tensor(a!) cache, Tensor index, Tensor dense, int dim, int batch_dim, int span=1) -> Tensor(a!)",
    blend_tokens_,
)
_define("store_(Tensor(a!) cache, Tensor value) -> Tensor(a!)", store_)
_define("difference(Tensor new, Tensor old, SymInt steps) -> Tensor", difference)
_define("token_age(Tensor stamp, SymInt since, SymInt step) -> Tensor", token_age)
_define(
    "difference_tokens(Tensor new, Tensor old, Tensor age, int dim, int batch_dim, int span=1) -> Tensor",
    difference_tokens,
)
_define(
    "forecast_tokens(Tensor cache, Tensor difference, Tensor age, SymInt used, int order, int dim, int batch_dim, "
    "int span=1) -> Tensor",
    forecast_tokens,
)
_define("token_norm(Tensor x, int dim, int batch_dim, int span=1) -> Tensor", token_norm)
_define("relative_change(Tensor now, Tensor before) -> Tensor", relative_change)
_define("forecast(Tensor cache, Tensor difference, SymInt power, int order) -> Tensor", forecast)
_define(
    "attention_received(Tensor query, Tensor key, Tensor? mask, float? scale, bool causal, int stride) -> Tensor",
    attention_received,
)
_define(
    "attention_entropy(Tensor query, Tensor key, Tensor? mask, float? scale, bool causal, float epsilon) -> Tensor",
    attention_entropy,
)
_define("row_entropy(Tensor weights, float epsilon) -> Tensor", row_entropy)
_define("pair_mean(Tensor score) -> Tensor", pair_mean)
_define("row_norm(Tensor x, bool negate) -> Tensor", row_norm)
_define("unit_scores(Tensor score) -> Tensor", unit_scores)
_define("random_scores(Tensor like, SymInt step, SymInt site, int seed) -> Tensor", random_scores)
_define(
    "select_tokens(Tensor base, Tensor stamp, SymInt k, SymInt step, SymInt since, float weight, int[] grid, int cell, "
    "float bonus) -> Tensor",
    select_tokens,
)
_define("mark_fresh_(Tensor(a!) stamp, Tensor index, SymInt step) -> Tensor(a!)", mark_fresh_)
