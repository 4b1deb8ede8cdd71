"""What the compiler is at, for whoever waits: tracing, proving, compiling.

Each stage is logged at INFO. Beside that it is shown while it lasts: on a terminal in a line that vanishes; elsewhere
not at all, or with ``TOCA_PROGRESS=1`` (and in the ``toca-compile`` command) a line each. ``TOCA_PROGRESS=0``: nothing.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

Sink = Callable[[str], None]  # is given what to show, and an empty string when there is nothing more to show

_LOCK = threading.Lock()
_sinks: list[Sink] = []


class _Thread(threading.local):
    stages = 0


_HERE = _Thread()


def stages() -> int:
    """How many stages this thread has begun: whether the compiler worked in between shows in the difference."""
    return _HERE.stages


@contextlib.contextmanager
def working(text: str, *, brief: bool = False) -> Iterator[None]:
    """The compiler is at ``text`` inside. A stage inside another takes its place, and does not give it back.

    Args:
        brief: a part of a stage, for which neither the log nor a terminal's history has a line.
    """
    _HERE.stages += 1
    if not brief:
        log.info("%s", text)
    sink = _sink()
    if sink is None or (brief and sink is plain_line):
        yield
        return
    with _LOCK:
        sink(text)
    try:
        yield
    finally:
        with _LOCK:
            sink("")


@contextlib.contextmanager
def shown(sink: Sink | None = None) -> Iterator[None]:
    """Show stages inside, whatever the environment says but ``TOCA_PROGRESS=0``: by ``sink``, or on stderr."""
    _sinks.append(sink or (live_line if _is_terminal() else plain_line))
    try:
        yield
    finally:
        _sinks.pop()


def live_line(text: str) -> None:
    """On a terminal: the text in the line where the cursor is, which is empty again afterwards."""
    _write(f"\r\x1b[K{shortened(text, shutil.get_terminal_size().columns - 1)}")


def shortened(text: str, width: int) -> str:
    """A text in so many columns."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def plain_line(text: str) -> None:
    """A line of its own."""
    if text:
        _write(f"toca_compile: {text}\n")


def _sink() -> Sink | None:
    wanted = os.environ.get("TOCA_PROGRESS", "")
    if wanted == "0":
        return None
    if _sinks:
        return _sinks[-1]
    if _is_terminal():
        return live_line
    return plain_line if wanted else None


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it: no reason to stop a sampling
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
