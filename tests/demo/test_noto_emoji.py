"""Emoji as pictures with names, from an archive as npm's."""

from pathlib import Path

import pytest
import torch

from tests.emoji import emoji_archive
from toca_compile.demo.noto_emoji import URL, download, read_emoji, words
from toca_compile.errors import TocaError


def test_reading(tmp_path: Path) -> None:
    emoji = read_emoji(emoji_archive(tmp_path / "emoji.tgz", 40))
    assert emoji.prompts[:2] == (
        "smileys & emotion, face-smiling, face no 0",
        "smileys & emotion, face-smiling, face no 1",
    )
    assert emoji.pictures.shape == (40, 3, 64, 64)
    # Its left half is transparent, which is white; the right half's red tells the number.
    assert (emoji.pictures[:, :, :, :32] == 1).all()
    assert torch.allclose(emoji.pictures[7, :, 0, 63], torch.tensor([2 * 7 / 255 - 1, -1, -1]))


def test_one_in_twenty_is_held_out(tmp_path: Path) -> None:
    trained, held_out = read_emoji(emoji_archive(tmp_path / "emoji.tgz", 40)).split()
    assert held_out.prompts == (
        "smileys & emotion, face-smiling, face no 10",
        "smileys & emotion, face-smiling, face no 30",
    )
    assert len(trained.prompts) == len(trained.pictures) == 38
    assert not set(trained.prompts) & set(held_out.prompts)
    assert [p[-2:] for p in trained.some(3).prompts] == [" 0", "13", "26"]


def test_words() -> None:
    assert words("Food & Drink, food-fruit, red apple") == ["food", "drink", "food", "fruit", "red", "apple"]
    assert words("") == []


def test_refused(tmp_path: Path) -> None:
    archive = emoji_archive(tmp_path / URL.rpartition("/")[2], 1)
    with pytest.raises(TocaError, match="another checksum than npm states"):
        download(tmp_path)
    with pytest.raises(TocaError, match="no emoji of the groups Flags"):
        read_emoji(archive, ("Flags",))
