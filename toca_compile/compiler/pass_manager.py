"""Runs the passes and does everything that surrounds a pass: verify, time, log, dump, name the culprit."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from toca_compile.errors import PassError, TocaError, UnsupportedGraphError
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Pass, Program
from toca_compile.ir.verify import verify

log = logging.getLogger(__name__)


class PassManager:
    """An ordered run over one program. After it, ``graphs`` holds the text after each pass, ``seconds`` its time.

    Args:
        passes: in order.
        dump_dir: where to write the graph after each pass, as ``03.find-sites.txt``.
    """

    def __init__(self, passes: Sequence[Pass], dump_dir: Path | None = None) -> None:
        self.passes = tuple(passes)
        self.dump_dir = dump_dir
        self.graphs: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def run(self, program: Program) -> Program:
        """Run all passes.

        Raises:
            PassError: a pass failed or broke the program; it names the pass and those that ran before.
            UnsupportedGraphError: as the capture pass raises it.
        """
        for i, step in enumerate(self.passes):
            start = time.perf_counter()
            try:
                program = step.run(program)
                verify(program)
            except UnsupportedGraphError:
                raise
            except (TocaError, AssertionError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
                before = ", ".join(p.name for p in self.passes[:i]) or "nothing"
                raise PassError(f"{step.name} failed after {before}: {error}") from error
            self.seconds[step.name] = time.perf_counter() - start
            log.debug("%s: %.0f ms", step.name, self.seconds[step.name] * 1e3)
            self.graphs[step.name] = text = print_graph(program.module.graph)
            if self.dump_dir is not None:
                self.dump_dir.mkdir(parents=True, exist_ok=True)
                (self.dump_dir / f"{i:02}.{step.name}.txt").write_text(text)
        return program
