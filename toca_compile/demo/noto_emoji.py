"""Noto's emoji as pictures with names, from npm's package ``emoji-datasource-google``. Needs the ``demo`` extra."""

import base64
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from toca_compile.errors import TocaError

URL = "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
GROUPS = ("Smileys & Emotion",)
SIZE = 64  # pixels of the package's pictures
HELD_OUT = 20  # one emoji of so many, in the order of Unicode's charts, is never trained on


@dataclass(frozen=True)
class Emoji:
    """Pictures and what they show.

    Attributes:
        pictures: ``[n, 3, 64, 64]`` in [−1, 1], on white.
        prompts: group, subgroup and name of each: ``"smileys & emotion, heart, blue heart"``.
    """

    pictures: Tensor
    prompts: tuple[str, ...]

    def split(self) -> tuple["Emoji", "Emoji"]:
        """Those to train on, and those held out."""
        held = [i % HELD_OUT == HELD_OUT // 2 for i in range(len(self.prompts))]
        return self._where([not h for h in held]), self._where(held)

    def some(self, count: int) -> "Emoji":
        """So many of them, evenly spread."""
        chosen = {i * len(self.prompts) // count for i in range(count)}
        return self._where([i in chosen for i in range(len(self.prompts))])

    def _where(self, chosen: list[bool]) -> "Emoji":
        prompts = tuple(p for p, c in zip(self.prompts, chosen, strict=True) if c)
        return Emoji(self.pictures[torch.tensor(chosen)], prompts)


def words(prompt: str) -> list[str]:
    """A prompt's words, in lower case."""
    return re.findall(r"[a-z0-9]+", prompt.lower())


def download(folder: Path) -> Path:
    """The package's archive (74 MB), fetched unless the folder has it.

    Raises:
        TocaError: it is not what it was when this was written.
    """
    path = folder / URL.rpartition("/")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL, timeout=60) as answer:
            path.write_bytes(answer.read())
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise TocaError(f"{path} has another checksum than npm states for it ({URL}): delete it and try again")
    return path


def read_emoji(archive: Path, groups: tuple[str, ...] = GROUPS) -> Emoji:
    """The emoji of some groups, in the order of Unicode's charts.

    Raises:
        TocaError: the archive has no such emoji.
    """
    from matplotlib.image import imread

    with tarfile.open(archive) as tar:
        listing = tar.extractfile("package/emoji.json")
        assert listing is not None
        wanted = [e for e in json.load(listing) if e["category"] in groups and e["has_img_google"]]
        wanted.sort(key=lambda e: int(e["sort_order"]))
        if not wanted:
            raise TocaError(f"{archive} has no emoji of the groups {', '.join(groups)}")
        pictures = []
        for entry in wanted:
            file = tar.extractfile(f"package/img/google/64/{entry['image']}")
            assert file is not None
            rgba = torch.from_numpy(imread(io.BytesIO(file.read()), format="png")).float()
            colour, alpha = rgba[..., :3], rgba[..., 3:]
            pictures.append((2 * (colour * alpha + 1 - alpha) - 1).permute(2, 0, 1))
    prompts = tuple(", ".join((e["category"], e["subcategory"], e["name"])).lower() for e in wanted)
    return Emoji(torch.stack(pictures), prompts)
