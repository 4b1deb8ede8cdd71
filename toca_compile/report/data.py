"""What a report knows, as plain data: sites × steps, with what is done, tokens, FLOPs and time."""

from dataclasses import dataclass

import sympy

from toca_compile.ir.types import StepKind

LETTERS = {
    StepKind.FULL: "F",
    StepKind.PARTIAL: "P",
    StepKind.FORECAST: "T",
    StepKind.REUSE: "R",
    StepKind.SKIP: "S",
}


class StepCounts(dict[str, int]):
    """How many steps of a run are of each kind that occurs; ``str`` of it is such as ``14 full, 36 partial``."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.items())


@dataclass(frozen=True)
class SiteReport:
    """One residual branch. ``actions``: names of what it may do; ``reason``: why it cannot be partial, or None.
    ``flops``: of its branch at all tokens; ``flops_partial``: an expression in K, or None."""

    name: str
    kind: str
    stream: str
    actions: frozenset[str]
    reason: str | None
    tokens: int
    depth: int
    flops: int
    flops_partial: sympy.Expr | None
    share: float


@dataclass(frozen=True)
class StepReport:
    """One step of a run. ``actions`` and ``tokens``: what each site does and how many tokens it computes, in the order
    of the graph's sites; ``flops`` of the step; ``seconds``: what it took in the last sampling, once for each guidance
    pass, without calls in which something was compiled."""

    index: int
    kind: str
    letter: str
    actions: tuple[str, ...]
    tokens: tuple[int, ...]
    flops: int
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class GraphReport:
    """One graph: a transformer, or what torch.compile made a graph of its own of it, for inputs of one shape.

    ``transformer``: the component's name in its pipeline, or empty; ``inputs``: by name, such as ``f32[2, 4, 8, 8]``;
    ``flops_full``: of a step of the uncached model.
    """

    transformer: str
    inputs: dict[str, str]
    sites: tuple[SiteReport, ...]
    steps: tuple[StepReport, ...]
    flops_full: int
    cache_bytes: int
