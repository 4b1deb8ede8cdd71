"""TopTokens: the tokens of the highest scores, each token's rank found by comparing it with all others."""

import triton
import triton.language as tl


@triton.jit
def _order(score):
    """Bits of a float32 that are ordered as the numbers are."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _raised(score, at, inside, offset, height, width, frames, CELL: tl.constexpr, BONUS: tl.constexpr):
    """The scores of the tokens ``at``, with the bonus."""
    own = tl.load(score + at, mask=inside, other=float("-inf"))
    if BONUS != 0.0:
        own = _with_bonus(score, at, own, inside, offset, height, width, frames, CELL, BONUS)
    return own


@triton.jit
def _with_bonus(
    score, at, own, inside, offset, height, width, frames, CELL: tl.constexpr, BONUS: tl.constexpr
):  # fmt: skip
    """A bonus for the best token of each cell of the picture, of equals for the first."""
    place = at - offset
    row, column, frame = (place // width) % height, place % width, place // (width * height)
    shown = inside & (place >= 0) & (place < frames * height * width)
    best = shown
    for i in tl.static_range(CELL * CELL):
        other_row, other_column = row // CELL * CELL + i // CELL, column // CELL * CELL + i % CELL
        there = shown & (other_row < height) & (other_column < width)
        other = tl.load(
            score + offset + (frame * height + other_row) * width + other_column, mask=there, other=float("-inf")
        )
        before = (other_row < row) | ((other_row == row) & (other_column < column))
        best = best & ((other < own) | ((other == own) & (before == 0)) | (there == 0))
    return tl.where(best, own + own * BONUS, own)


@triton.jit
def top_tokens_kernel(
    score, out, tokens, k, offset, height, width, frames,
    CELL: tl.constexpr, BONUS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of tokens against all tokens of their sample, a tile of them at a time. Of equal scores the first is the
    higher."""
    score += tl.program_id(1).to(tl.int64) * tokens
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    own = _order(_raised(score, at, at < tokens, offset, height, width, frames, CELL, BONUS))
    rank = tl.zeros([TILE], tl.int32)
    for start in range(0, tokens, TILE):
        others = start + tl.arange(0, TILE)
        inside = others < tokens
        other = _order(_raised(score, others, inside, offset, height, width, frames, CELL, BONUS))
        higher = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (others[None, :] < at[:, None]))
        rank += tl.sum((higher & inside[None, :]).to(tl.int32), 1)
    tl.store(out + tl.program_id(1).to(tl.int64) * k + rank, at.to(tl.int64), mask=(at < tokens) & (rank < k))
