"""Where the compiler's texts go while it works: its log, a folder, and torch's structured trace (tlparse).

``TORCH_LOGS="+toca_compile"`` shows every text, ``TORCH_LOGS="toca_compile"`` one line a stage.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

log = logging.getLogger(__name__)


def show(stage: str, line: Callable[[], str], text: Callable[[], str], folder: Path | None = None) -> None:
    """Tell that a stage is done.

    Args:
        stage: its name, such as ``03.find-sites``.
        line: makes what it took and found, logged at INFO.
        text: makes its text, which is asked for only where it goes somewhere: the log at DEBUG, ``folder`` as
            ``<stage>.txt``, and the trace as the artifact ``toca_compile.<stage>``.
    """
    made = functools.cache(text)
    if log.isEnabledFor(logging.INFO):
        log.info("%s: %s", stage, line())
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", stage, made())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stage}.txt").write_text(made(), encoding="utf-8")
    # Not among torch's public calls, so that a version without it traces nothing of ours.
    structured = getattr(torch._logging, "trace_structured", None)
    if structured is not None:
        metadata = {"name": f"toca_compile.{stage}", "encoding": "string"}
        structured("artifact", metadata_fn=lambda: metadata, payload_fn=made)
