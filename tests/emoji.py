"""An archive of emoji of our own, laid out as npm's."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np

GROUP = "Smileys & Emotion"


def emoji_archive(path: Path, count: int) -> Path:
    """Writes so many pictures: the left half is transparent, the right half's red is the number."""
    from matplotlib.image import imsave

    listing = [
        {
            "name": f"FACE NO {i}", "category": GROUP, "subcategory": "face-smiling", "sort_order": i,
            "image": f"{i}.png", "has_img_google": True,
        }
        for i in range(count)
    ]  # fmt: skip
    files = {"emoji.json": json.dumps(listing[::-1]).encode()}
    for i in range(count):
        picture = np.zeros((64, 64, 4), np.uint8)
        picture[:, :, 0], picture[:, 32:, 3] = i, 255
        file = io.BytesIO()
        imsave(file, picture, format="png")
        files[f"img/google/64/{i}.png"] = file.getvalue()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def checksum(path: Path) -> str:
    """As npm states it."""
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
