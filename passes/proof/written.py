"""Written: may a graph go on changing an input in place, though some of its branches are not computed at each step?

What a fragment of a model writes to, the fragment before it made at this step. The write is done at every step, from a
value that every step computes: then it is the model's own. What follows from a branch may come from the cache.
"""

from collections.abc import Sequence

from torch import fx

from toca_compile.errors import UnsupportedGraphError
from toca_compile.ir.graph import source_line
from toca_compile.ir.types import Site


def check_written(graph: fx.Graph, sites: Sequence[Site], written: Sequence[fx.Node]) -> None:
    """That no value which is ``written`` to an input follows from a site.

    Raises:
        UnsupportedGraphError: one does.
    """
    if not written:
        return
    cached = {n for site in sites for n in (*site.region, site.add)}
    for node in graph.nodes:
        if not cached.isdisjoint(node.all_input_nodes):
            cached.add(node)
    for node in written:
        if node in cached:
            raise UnsupportedGraphError(
                f"the model changes one of its inputs in place, to what follows from a branch that may be cached "
                f"({source_line(node)}): return it instead"
            )
