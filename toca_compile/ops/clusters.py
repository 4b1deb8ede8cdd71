"""Clusters of tokens: found among a value's rows, one token of each computed, the others moved towards it."""

import torch
from torch import Tensor

from toca_compile.ops.registry import op
from toca_compile.ops.rows import by_token, merged, spread, wide
from toca_compile.ops.selection import distinct

_FIRST = 1 << 62  # above every key of a number in [0, 1)


@op(
    "cluster_tokens(Tensor x, Tensor order, int clusters, int rounds, int dim, int batch_dim, int span=1) -> Tensor"
)  # fmt: skip
def cluster_tokens(
    x: Tensor, order: Tensor, clusters: int, rounds: int, dim: int, batch_dim: int, span: int = 1
) -> Tensor:
    """Lloyd's k-means of each sample's tokens by their features, from the tokens highest in ``order`` as centres.

    Tokens go to the nearest centre ``rounds`` times, of equally near ones to the first; in between each centre becomes
    the mean of its tokens, and stays where it has none.

    Args:
        x: any rank; dimensions as in ``gather_tokens``.
        order: float32 ``[batch, tokens]`` in [0, 1).

    Returns:
        int32 ``[batch, tokens]``, the cluster of each.
    """
    points = by_token(x, dim, batch_dim, span).reshape(*order.shape, -1)
    points = points - points.mean(1, keepdim=True)  # what all share would cost the distances their last digits
    start = distinct(order).topk(clusters, dim=1).indices
    centres = points.gather(1, start.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    numbers = torch.arange(clusters, device=x.device)
    nearest = _nearest(points, centres, numbers)
    for _ in range(rounds - 1):
        member = (nearest.unsqueeze(-1) == numbers).to(points.dtype)
        count = member.sum(1).unsqueeze(-1)
        means = member.transpose(1, 2) @ points / count.clamp(min=1)
        centres = torch.where(count > 0, means, centres)
        nearest = _nearest(points, centres, numbers)
    return nearest.to(torch.int32)


def _nearest(points: Tensor, centres: Tensor, numbers: Tensor) -> Tensor:
    distance = centres.square().sum(-1).unsqueeze(1) - 2 * (points @ centres.transpose(1, 2))
    # The first of the least, on any device; where nothing is a number, the last.
    return torch.where(distance == distance.amin(-1, keepdim=True), numbers, numbers[-1]).amin(-1)


@op("pick_tokens(Tensor cluster, Tensor order, int clusters, SymInt k) -> Tensor")
def pick_tokens(cluster: Tensor, order: Tensor, clusters: int, k: int) -> Tensor:
    """``k`` tokens: of each cluster the highest in ``order``; if there are fewer, since some cluster has no token, as
    many others as are highest.

    Args:
        cluster: int32 ``[batch, tokens]``.
        order: float32 ``[batch, tokens]`` in [0, 1).

    Returns:
        int64 ``[batch, k]``, in no particular order.
    """
    keys, label = distinct(order), cluster.to(torch.int64)
    best = keys.new_full([keys.shape[0], clusters], -1).scatter_reduce(1, label, keys, "amax")
    first = (keys == best.gather(1, label)).to(torch.int64)
    return (keys + first * _FIRST).topk(k, dim=1, sorted=False).indices


@op("proxies(Tensor cluster, Tensor index, int clusters) -> Tensor")
def proxies(cluster: Tensor, index: Tensor, clusters: int) -> Tensor:
    """For each token the computed one, of those in ``index``, that tells of it: one of its cluster; itself where it was
    computed, or none of its cluster was. int64 ``[batch, tokens]``."""
    label = cluster.to(torch.int64)
    none = index.new_full([label.shape[0], clusters], -1)
    proxy = none.scatter_reduce(1, label.gather(1, index), index, "amax").gather(1, label)
    own = torch.arange(label.shape[1], device=label.device)
    return torch.where(proxy < 0, own, proxy).scatter(1, index, index)


@op("drawn_to(Tensor value, Tensor proxy, float share, int dim, int batch_dim, int span=1) -> Tensor")
def drawn_to(value: Tensor, proxy: Tensor, share: float, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """share · (value[proxy] − value), in float32 (a double's own): by what each token's row changes that goes this
    share of the way to the row of its ``proxy`` ``[batch, tokens]``. Dimensions are as in ``gather_tokens``."""
    if batch_dim == dim:
        apart = value.unflatten(dim, (proxy.shape[0], -1))
        return drawn_to(apart, proxy, share, dim + 1, dim).flatten(dim, dim + 1)
    x, batch_dim = merged(value, dim, batch_dim, span)
    return ((wide(x.gather(dim, spread(proxy, x, dim, batch_dim))) - wide(x)) * share).reshape(value.shape)
