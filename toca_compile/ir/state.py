"""What a variant is given beside the segment's values: buffers that live from step to step, and host numbers."""

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """A buffer of a site (or of an output of a skipped range). All are zero when a run begins."""

    OUTPUT = "cache"  # the last version of the branch's output
    HISTORY = "history"  # what is kept beside it: differences, or earlier versions
    STALE_INPUT = "stale"  # a value of the branch that its rows take from the last full step
    KEYS = "keys"  # what queries read whole
    STAMP = "stamp"  # int32 [batch, tokens]: the step in which each token was last selected
    SCORE = "score"  # what the selector measured of its tokens, such as float32 [batch, tokens]: how much each matters
    SOURCE_SCORE = "source_score"  # the same of the site that its own tokens are selected by
    CHANGE = "change"  # what the blocks before a skipped range changed

    @property
    def holds_values(self) -> bool:
        """Whether it holds values of the model, which a policy may keep in another dtype or elsewhere."""
        return self not in (State.STAMP, State.SCORE, State.SOURCE_SCORE)


class Number(Enum):
    """A host number of one step: an argument that may take any value without a recompile."""

    K = "k"  # how many tokens are selected
    STEP = "step"
    SINCE = "since"  # the last step that computed all tokens
    SITE = "site"
    KEEP = "keep"  # of a history that is written: the steps that a difference spans
    SIGMA = "sigma"  # the share of noise, in units of 2⁻³²
    MOVE = "move"  # of one that is moved on: what a difference is multiplied by

    @property
    def is_held(self) -> bool:
        """Whether it may lie in memory, for a graph that is recorded once: K is a shape."""
        return self is not Number.K

    def named(self, index: int) -> str:
        """As a table calls one that only a run tells."""
        return f"{self.value} {index}"


@dataclass(frozen=True)
class Slot:
    """An input of a variant beside the segment's values. ``position`` counts the segment's sites (in the graphs that
    stand in for a skipped range, its outputs); ``index`` tells apart several of a kind, such as orders."""

    kind: State | Number
    position: int
    index: int = 0

    @property
    def is_buffer(self) -> bool:
        """Whether it is a tensor that lives as long as the run."""
        return isinstance(self.kind, State)

    @property
    def is_held(self) -> bool:
        """Whether it is a number that may lie in memory."""
        return isinstance(self.kind, Number) and self.kind.is_held

    @property
    def name(self) -> str:
        """As the graph's input is called."""
        return f"{self.kind.value}{self.position}" + (f"_{self.index}" if self.index else "")


def sizes_of(number: int) -> tuple[int, int, int]:
    """The sizes of an empty tensor that tells a host number to code that takes tensors alone: the last two are what is
    positive of it, and what is negative."""
    return 0, max(number, 0), max(-number, 0)
