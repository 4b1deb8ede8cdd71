"""The second trained model's parts: how pictures, positions and words come into it."""

import torch

from toca_compile.demo import emoji_flux


def test_pictures_as_tokens() -> None:
    pictures = torch.randn(2, 3, 32, 32)
    tokens = emoji_flux.packed(pictures)
    assert tokens.shape == (2, 256, 12)
    assert torch.equal(tokens[0, 17].reshape(3, 2, 2), pictures[0, :, 2:4, 2:4])  # second row, second column
    assert torch.equal(emoji_flux.unpacked(tokens), pictures)


def test_positions_do_not_depend_on_the_size_of_a_picture() -> None:
    full, half = (emoji_flux.positions(side)["img_ids"].reshape(side // 2, side // 2, 3) for side in (32, 16))
    assert full[0, :3].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    means = full.unflatten(0, (8, 2)).unflatten(2, (8, 2)).mean((1, 3))
    assert torch.equal(half, means)


def test_words_it_does_not_know_are_left_out() -> None:
    text = emoji_flux.Text(["", "red", "apple"], 4)
    assert text.indices(["Red APPLE", "a red, red rose", ""])[:, :3].tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 0]]
    assert text.indices(["red " * 99]).shape == (1, emoji_flux.WORDS)
