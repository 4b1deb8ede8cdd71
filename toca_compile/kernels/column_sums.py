"""ColumnSums: the attention that keys receive, from queries, keys and the log-sum-exp of each row."""

import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(
    query, key, total, out,
    query_batch, query_head, query_row, key_batch, key_head, key_row, total_batch, total_head, total_row,
    heads, queries, keys,
    SCALE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys against all queries, a tile of them at a time. ``WIDTH``: a power of two that holds ``SIZE``."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # exponentials are of base 2
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    total += batch * total_batch + head * total_head
    features = tl.arange(0, WIDTH)
    k = tl.load(
        key + columns[:, None] * key_row + features[None, :],
        mask=(columns[:, None] < keys) & (features[None, :] < SIZE),
        other=0.0,
    )
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, queries, TILE):
        rows = start + tl.arange(0, TILE)
        q = tl.load(
            query + rows[None, :] * query_row + features[:, None],
            mask=(rows[None, :] < queries) & (features[:, None] < SIZE),
            other=0.0,
        )
        # Beyond the last query an infinite sum makes each weight zero.
        sum_of_row = tl.load(total + rows * total_row, mask=rows < queries, other=float("inf"))
        logits = tl.dot(k, q, input_precision=PRECISION) * SCALE - sum_of_row[None, :]
        sums += tl.sum(tl.exp2(logits * LOG2_E), 1)
    tl.store(out + tl.program_id(1).to(tl.int64) * keys + columns, sums, mask=columns < keys)
