"""Which tokens a step computes: by score, by age, and by place in the picture."""

import torch
from torch import Tensor

from toca_compile import kernels
from toca_compile.ops.registry import op

_TILE = 64  # tokens of one program, and that it compares them with at a time
_RANKED = 8192  # tokens that are compared with each other in one kernel; more are sorted


@op(
    "select_tokens(Tensor base, Tensor stamp, SymInt k, SymInt step, SymInt since, float weight, "
    "int[] grid, int cell, float bonus) -> Tensor"
)
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
    if kernels.run_on(score.device) and score.shape[1] <= _RANKED:
        return top_tokens(score, k, grid, cell, bonus)
    if grid and bonus:
        score = _cell_bonus(score, grid, cell, bonus)
    return distinct(score).topk(k, dim=1, sorted=False).indices


def distinct(score: Tensor) -> Tensor:
    """int64 keys of float32 scores ``[batch, tokens]`` in a total order: score bits made monotonic, then the token's
    index, the first highest. Top-k of distinct keys has one answer."""
    bits = score.contiguous().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = torch.arange(score.shape[1] - 1, -1, -1, device=score.device, dtype=torch.int64)
    return bits.to(torch.int64) * (1 << 32) + order


def top_tokens(score: Tensor, k: int, grid: list[int], cell: int, bonus: float) -> Tensor:
    """The same tokens by one Triton kernel, instead of three and a sort."""
    from toca_compile.kernels.top_tokens import top_tokens_kernel

    height, width, offset, frames = grid or (1, 1, 0, 0)
    batch, tokens = score.shape
    out = torch.empty(batch, k, dtype=torch.int64, device=score.device)
    torch.library.wrap_triton(top_tokens_kernel)[(-(-tokens // _TILE), batch)](
        score.contiguous(), out, tokens, k, offset, height, width, frames,
        CELL=cell, BONUS=float(bonus) if grid else 0.0, TILE=_TILE,
    )  # fmt: skip
    return out


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


@op("mark_fresh_(Tensor(a!) stamp, Tensor index, SymInt step) -> Tensor(a!)")
def mark_fresh_(stamp: Tensor, index: Tensor, step: int) -> Tensor:
    """Note that the tokens ``index`` were recomputed in ``step``, in place."""
    samples = torch.arange(index.shape[0], device=index.device)
    value = (torch.zeros((), dtype=stamp.dtype, device=stamp.device) + step).to(stamp.dtype)
    return stamp.index_put_((samples[:, None], index), value)
