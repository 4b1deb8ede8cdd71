"""Rows of tokens in a value: taken out, written back, blended; and a whole value kept."""

from math import prod

import torch
from torch import Tensor

from toca_compile.ops.registry import op


@op("gather_tokens(Tensor x, Tensor index, int dim, int batch_dim, int span=1) -> Tensor")
def gather_tokens(x: Tensor, index: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """Rows ``index[b]`` of ``x`` along ``dim``, each sample its own.

    Args:
        x: any rank; ``x.shape[batch_dim]`` is the batch.
        index: int64 ``[batch, k]``.
        dim: token dimension of ``x``, the first of ``span`` (frames and patches), which become one.
        batch_dim: batch dimension of ``x``; −1 where it has none (then ``index`` is ``[1, k]``); ``dim`` itself where
            both lie in one, sample by sample, as they then do in the result.
    """
    if batch_dim == dim:
        apart = gather_tokens(x.unflatten(dim, (index.shape[0], -1)), index, dim + 1, dim)
        return apart.flatten(dim, dim + 1)
    x, batch_dim = merged(x, dim, batch_dim, span)
    return x.gather(dim, spread(index, x, dim, batch_dim))


@op("gather_own(Tensor x, Tensor index, int[] sizes, int[] kinds, int[] tokens, int[] order, int[] groups) -> Tensor")
def gather_own(
    x: Tensor, index: Tensor, sizes: list[int], kinds: list[int], tokens: list[int], order: list[int], groups: list[int]
) -> Tensor:
    """The part of ``x`` that belongs to each of the tokens ``index``: of a window's keys all, of a table its row.

    Args:
        x: of dimensions that are ``sizes`` multiplied.
        index: int64 ``[batch, k]``; a token is a place in all ``tokens`` multiplied.
        kinds: of each size, which of ``tokens`` it is, −2 if it numbers samples, or −1.
        order: of what is left, how it lies in the result: the numbers of the sizes that are −1, −1 for the rows, −2 for
            samples.
        groups: how many of these each dimension of the result holds, one after the other.
    """
    alike = [[i for i, kind in enumerate(kinds) if test(kind)] for test in ((-2).__eq__, (0).__le__, (-1).__eq__)]
    samples, places, others = alike
    apart = x.reshape(sizes).permute(*samples, *places, *others)
    lead = [prod(sizes[i] for i in some) for some in (samples, places)]
    apart = apart.reshape(*lead, *(sizes[i] for i in others)).expand(index.shape[0], *[-1] * (1 + len(others)))
    flat = torch.zeros_like(index)
    for i in places:
        minor = prod(tokens[kinds[i] + 1 :])
        flat = flat * sizes[i] + index.div(minor, rounding_mode="floor") % tokens[kinds[i]]
    rows = apart.gather(1, spread(flat, apart, 1, 0))
    rows = rows if -2 in order else rows[0]
    ahead = 2 if -2 in order else 1
    rows = rows.permute([ahead - 1 if o == -1 else 0 if o == -2 else ahead + o for o in order])
    shape, at = [], 0
    for count in groups:
        shape.append(prod(rows.shape[at : at + count]))
        at += count
    return rows.reshape(shape)


@op("join_tokens(Tensor[] rows, Tensor index, int[] starts, int dim, int batch_dim, int span=1) -> Tensor")
def join_tokens(
    rows: list[Tensor], index: Tensor, starts: list[int], dim: int, batch_dim: int, span: int = 1
) -> Tensor:
    """Of values ``rows``, each of all tokens ``index``, the one in whose part of the axis a token lies: the last that
    starts (``starts``, ascending from 0) before it. Among rows the tokens are one dimension, whatever the ``span``."""
    if batch_dim > dim:
        batch_dim -= span - 1
    joined = rows[0]
    for value, start in zip(rows[1:], starts[1:], strict=True):
        joined = torch.where(spread(index, value, dim, batch_dim) >= start, value, joined)
    return joined


@op("scatter_tokens_(Tensor(a!) cache, Tensor index, Tensor rows, int dim, int batch_dim, int span=1) -> Tensor(a!)")
def scatter_tokens_(cache: Tensor, index: Tensor, rows: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """Write ``rows`` to the places ``index`` of ``cache`` (contiguous), in place; returns ``cache``."""
    if batch_dim == dim:
        apart = cache.unflatten(dim, (index.shape[0], -1))
        scatter_tokens_(apart, index, rows.unflatten(dim, (index.shape[0], -1)), dim + 1, dim)
        return cache
    flat, batch_dim = merged(cache, dim, batch_dim, span)
    # Inductor puts rows in place, and would make copies of the whole cache for ``scatter_``.
    places: list[Tensor | None] = [None] * (max(dim, batch_dim) + 1)
    if batch_dim < 0:
        places[dim] = index[0]
    else:
        beside = abs(dim - batch_dim) == 1
        samples = torch.arange(index.shape[0], device=index.device)
        along = batch_dim < dim or not beside
        places[batch_dim], places[dim] = (samples[:, None], index) if along else (samples, index.t())
        # The dimensions of indices that are not beside each other come first.
        rows = rows if beside else rows.movedim((batch_dim, dim), (0, 1))
    torch.ops.aten.index_put_.default(flat, places, rows.to(cache.dtype))
    return cache


@op("blend_tokens_(Tensor(a!) cache, Tensor index, Tensor dense, int dim, int batch_dim, int span=1) -> Tensor(a!)")
def blend_tokens_(cache: Tensor, index: Tensor, dense: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """As ``scatter_tokens_``, from a value computed for all tokens: the plain meaning of a partial step."""
    if batch_dim == dim:
        apart, new = (x.unflatten(dim, (index.shape[0], -1)) for x in (cache, dense))
        blend_tokens_(apart, index, new, dim + 1, dim)
        return cache
    flat, batch_dim = merged(cache, dim, batch_dim, span)
    chosen = torch.zeros(index.shape[0], flat.shape[dim], dtype=torch.bool, device=cache.device)
    chosen = chosen.scatter(1, index, True)
    chosen = chosen if batch_dim < dim else chosen.t()
    shape = [1] * flat.dim()
    shape[dim] = flat.shape[dim]
    if batch_dim >= 0:
        shape[batch_dim] = flat.shape[batch_dim]
    flat.copy_(torch.where(chosen.reshape(shape), dense.reshape(flat.shape), flat))
    return cache


@op("store_(Tensor(a!) cache, Tensor value) -> Tensor(a!)")
def store_(cache: Tensor, value: Tensor) -> Tensor:
    """Keep ``value``: copy it into ``cache`` in place; returns ``cache``."""
    return cache.copy_(value)


@op("shift_(Tensor(a!) cache, Tensor change) -> Tensor(a!)")
def shift_(cache: Tensor, change: Tensor) -> Tensor:
    """Add ``change`` to ``cache`` in place; returns ``cache``."""
    return cache.copy_(wide(cache) + change)


def wide(x: Tensor) -> Tensor:
    """In float32, or a double as it is."""
    return x if x.dtype == torch.float64 else x.float()


def merged(x: Tensor, dim: int, batch_dim: int, span: int) -> tuple[Tensor, int]:
    """``x`` with its token dimensions as one, and where its batch then is."""
    if span == 1:
        return x, batch_dim
    return x.flatten(dim, dim + span - 1), batch_dim - (span - 1 if batch_dim > dim else 0)


def by_token(x: Tensor, dim: int, batch_dim: int, span: int) -> Tensor:
    """Each token's features, whatever dimensions they lie in: float32 ``[batch, tokens, features]``, or, of samples and
    tokens in one dimension (``batch_dim`` is ``dim``), ``[1, batch · tokens, features]``."""
    x, batch_dim = merged(x.float(), dim, -1 if batch_dim == dim else batch_dim, span)
    front = x.movedim((batch_dim, dim), (0, 1)) if batch_dim >= 0 else x.movedim(dim, 0).unsqueeze(0)
    return front.flatten(2)


def spread(index: Tensor, like: Tensor, dim: int, batch_dim: int) -> Tensor:
    """``index`` with the rank of ``like``, expanded over every other dimension."""
    view = [1] * like.dim()
    if batch_dim >= 0:
        view[batch_dim] = index.shape[0]
    view[dim] = index.shape[1]
    full = list(like.shape)
    full[dim] = index.shape[1]
    laid = index if batch_dim < dim else index.t()
    return laid.reshape(view).expand(full)
