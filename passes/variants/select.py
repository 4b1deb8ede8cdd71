"""Select: the emission of selectors. What is measured at a step that computes all tokens, the indices of those that a
later one computes, and what becomes of the others."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from toca_compile.ir.selectors import TokenSelector
from toca_compile.ir.state import Number, State
from toca_compile.ir.types import AxisTypes, RowProof, Site
from toca_compile.passes.variants.emit import Emissions, SegmentBuilder

toca = torch.ops.toca

SELECTIONS: "Emissions[type[Selection]]" = Emissions()


class Selection:
    """One site's tokens in the graph of a variant, as a selector chooses among them. Here nothing is measured, and the
    tokens left out stay as they are.

    Args:
        builder: of the graph.
        position: of the site.
    """

    def __init__(self, builder: SegmentBuilder, position: int, site: Site) -> None:
        self.builder, self.position, self.site = builder, position, site

    @staticmethod
    def check(selector: TokenSelector, source: Site, types: AxisTypes) -> None:
        """Whether a site shows what is to be measured of it.

        Raises:
            PolicyError: it does not.
        """

    def measure(self, expected: Callable[[], fx.Node]) -> Sequence[fx.Node]:
        """The selector's ``measured`` buffers anew, at a step that computed all of the site.

        Args:
            expected: emits the forecast of the site's output.
        """
        return ()

    def agreed(self, value: fx.Node) -> fx.Node:
        """What was measured, the same on all processes that share the graph's work: here, what the first of them
        measured."""
        return self.builder.agreed(value, self.builder.types.groups)

    def measure_rows(self, proof: RowProof, values: Mapping[fx.Node, fx.Node]) -> Sequence[fx.Node]:
        """The same for the selected tokens, from the ``values`` of a step that computed those; nothing where it does
        not tell."""
        return ()

    def select(self) -> fx.Node:
        """The tokens to compute, int64 ``[batch, k]``, marked as computed in this step."""
        index = self.choose()
        stamp, step = self.builder.slot(State.STAMP, self.position), self.builder.slot(Number.STEP, self.position)
        self.builder.call(toca.mark_fresh_.default, stamp, index, step)
        return index

    def choose(self) -> fx.Node:
        """Those tokens."""
        raise NotImplementedError

    def spread(self, value: fx.Node, index: fx.Node, places: Sequence[int]) -> fx.Node | None:
        """By what the site's output ``value`` changes where the tokens ``index`` were computed, for what they tell of
        the others; None where they tell nothing. ``places``: where the tokens and the batch lie in it."""
        return None

    def source(self, index: int = 0) -> fx.Node:
        """A buffer of what was measured to select by; for a site that has a source."""
        source = self.builder.selector.source(self.site)
        assert source is not None
        # One buffer must be one input, or the order of its writes and reads is lost.
        owner = next((i for i, s in enumerate(self.builder.sites) if s.index == source.site), None)
        kind, position = (State.SOURCE_SCORE, self.position) if owner is None else (State.SCORE, owner)
        return self.builder.slot(kind, position, index)


def selection_of(builder: SegmentBuilder, position: int, site: Site) -> Selection:
    """A site's tokens, as the plan selects them."""
    return SELECTIONS.find(builder.selector)(builder, position, site)
