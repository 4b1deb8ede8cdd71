"""Runs the passes and does everything that surrounds a pass: verify, time, show, name the culprit."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from toca_compile.compiler.trace import show
from toca_compile.errors import PassError, TocaError, UnsupportedGraphError
from toca_compile.ir.program import Pass, Program
from toca_compile.ir.program_printer import print_program, summary
from toca_compile.ir.verify import verify
from toca_compile.progress import working


class PassManager:
    """An ordered run over one program. After it, ``graphs`` are the texts after each pass, ``seconds`` their times.

    Args:
        passes: in order.
        dump_dir: where to write the text after each pass, as ``03.find-sites.txt``.
    """

    def __init__(self, passes: Sequence[Pass], dump_dir: Path | None = None) -> None:
        self.passes = tuple(passes)
        self.dump_dir = dump_dir
        self._programs: dict[str, Program] = {}
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
                with working(f"proving what may be cached: {step.name}, {i + 1} of {len(self.passes)}", brief=True):
                    program = step.run(program)
                    verify(program)
            except UnsupportedGraphError:
                raise
            except (TocaError, AssertionError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
                before = ", ".join(p.name for p in self.passes[:i]) or "Dynamo"
                raise PassError(
                    f"{step.name} failed after {before}: {str(error).rstrip('.')} (strict=False runs the model "
                    "uncached; CONTRIBUTING.md says what a report of this should have)"
                ) from error
            self.seconds[step.name] = time.perf_counter() - start
            self._programs[step.name] = program
            show(f"{i:02}.{step.name}", partial(self._line, step.name), partial(self.text, step.name), self.dump_dir)
        return program

    def text(self, name: str) -> str:
        """What was known after a pass."""
        return print_program(self._programs[name], list(self.seconds)[: list(self.seconds).index(name) + 1])

    def _line(self, name: str) -> str:
        """How long a pass took and what it found."""
        return f"{self.seconds[name] * 1e3:.0f} ms, {summary(self._programs[name], name)}"

    @property
    def graphs(self) -> dict[str, str]:
        """The text after each pass that ran, printed when it is asked for."""
        return {name: self.text(name) for name in self._programs}
