"""How tokens lie in a picture, as tables of positions and latents tell it."""

import pytest
import torch

from toca_compile.compiler.layouts import layouts_of
from toca_compile.ir.types import Layout


def table(height: int, width: int, picture: int = 0, start: int = 0) -> torch.Tensor:
    """Positions ``[height · width, 3]``: picture, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.full_like(rows, picture), rows + start, columns + start], dim=-1)
    return places.flatten(0, 1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("batched", [False, True])
def test_a_table_of_positions(dtype: torch.dtype, batched: bool) -> None:
    ids = table(4, 6).to(dtype)
    assert layouts_of([ids[None] if batched else ids], None) == (Layout(24, 4, 6),)


def test_several_pictures() -> None:
    """As many as are alike stand in ``frames``; one of another size behind them ends them."""
    assert layouts_of([torch.cat([table(4, 6), table(4, 6, 1)])], None) == (Layout(48, 4, 6, 2),)
    assert layouts_of([torch.cat([table(4, 6), table(4, 4, 1)])], None) == (Layout(40, 4, 6, 1),)
    assert layouts_of([table(4, 6, start=3)], None) == (Layout(24, 4, 6),)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(24, 3),  # text has no place
        torch.arange(24.0)[:, None].expand(24, 3),  # a sequence is no picture
        table(4, 6)[torch.tensor([*range(1, 24), 0])],  # out of order
        table(4, 6).flip(-1),  # column by column
        torch.randn(24, 3, generator=torch.Generator().manual_seed(0)),
        table(4, 6).to(torch.complex64),
        table(4, 6).to("meta"),
        table(4, 6)[:0],
        torch.randn(2, 24, 16),
        24,
    ],
    ids=range(10),
)
def test_what_is_no_table(value: object) -> None:
    assert layouts_of([value], (2, 2)) == ()


def test_latents_and_the_patch_that_the_model_names() -> None:
    picture, video = torch.randn(1, 4, 8, 12), torch.randn(1, 4, 3, 8, 12)
    assert layouts_of([picture, video], (2, 2)) == (Layout(24, 4, 6), Layout(72, 4, 6, 3))
    assert layouts_of([picture, video], None) == ()
