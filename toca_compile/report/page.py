"""The report as one page of HTML that needs no network: sites × steps, FLOPs and time, tokens over the picture."""

import base64
import html
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from torch import Tensor

from toca_compile.errors import TocaError
from toca_compile.report.data import GraphReport


@dataclass(frozen=True)
class Shown:
    """What a page can show beside the report.

    Args:
        picture: of the sample, ``[channels, height, width]`` with 1 or 3 channels, floats in [−1, 1].
        tokens: for each step, the share of sites that computed each token: ``[tokens]``, floats in [0, 1].
        grid: the tokens' height and width.
        errors: for each step, the relative error of the latents against a reference, by name of the curve.

    Raises:
        TocaError: shapes that do not fit each other.
    """

    picture: Tensor | None = None
    tokens: Sequence[Tensor] = ()
    grid: tuple[int, int] | None = None
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.picture is not None and (self.picture.dim() != 3 or self.picture.shape[0] not in (1, 3)):
            raise TocaError(f"picture must be [1 or 3, height, width], not {list(self.picture.shape)}")
        if self.tokens:
            count = self.grid[0] * self.grid[1] if self.grid is not None else 0
            if any(t.shape != (count,) for t in self.tokens):
                raise TocaError(f"tokens must be [{count}] a step, as the grid {self.grid} says")

    def data(self) -> dict[str, Any]:
        """As JSON's own types."""
        return {
            "picture": None if self.picture is None else "data:image/png;base64," + _png(self.picture),
            "tokens": [[round(float(v), 3) for v in step] for step in self.tokens],
            "grid": self.grid,
            "errors": {name: [float(v) for v in curve] for name, curve in self.errors.items()},
        }


def page(title: str, graphs: Sequence[GraphReport], policy: Any, text: str, shown: Shown) -> str:
    """The page.

    Args:
        title: of the page.
        graphs: ``Report.data``.
        policy: as JSON's own types, or its text where it is no policy of this package.
        text: the report as it is printed.
        shown: pictures and curves.
    """
    data = {
        "graphs": [_graph(graph) for graph in graphs],
        "policy": policy,
        "shown": shown.data(),
    }
    # "</" would end the script that holds the data.
    told = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    template = files("toca_compile.report").joinpath("page.html").read_text(encoding="utf-8")
    for mark, value in (("TITLE", html.escape(title)), ("TEXT", html.escape(text)), ("DATA", told)):
        template = template.replace(f"%{mark}%", value)
    return template


def _graph(graph: GraphReport) -> dict[str, Any]:
    return {
        "name": graph.transformer,
        "inputs": graph.inputs,
        "full": graph.flops_full,
        "cache": graph.cache_bytes,
        "sites": [{"name": s.name, "kind": s.kind, "tokens": s.tokens} for s in graph.sites],
        "steps": [
            {
                "kind": s.kind, "actions": s.actions, "tokens": s.tokens, "flops": int(s.flops),
                "seconds": sum(s.seconds) if s.seconds else None,
            }
            for s in graph.steps
        ],
    }  # fmt: skip


def _png(picture: Tensor) -> str:
    """A PNG (8 bits a channel), in base64."""
    pixels = ((picture.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return base64.b64encode(out).decode()
