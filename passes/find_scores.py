"""FindScores: whose attention ranks each site's tokens.

Two kinds of score come from an attention: what a token receives as a key (s1), and how its own row as a query is spread
(s2). A site asks an attention of its own block if there is one, the last before it first; else the last of an earlier
block, else the next. So the blocks of a template ask alike.
"""

from dataclasses import replace

from toca_compile.ir.factors import Product
from toca_compile.ir.types import Attention, AxisTypes, ScoreSource, Site


def find_scores(sites: tuple[Site, ...], types: AxisTypes) -> tuple[Site, ...]:
    """The sites with their scorers."""
    return tuple(_with_scorers(site, sites, types) if site.row_proof or site.query_proof else site for site in sites)


def _with_scorers(site: Site, sites: tuple[Site, ...], types: AxisTypes) -> Site:
    keys: dict[int, ScoreSource] = {}
    queries: dict[int, ScoreSource] = {}
    seen: set[object] = set()
    for other in sites:
        if not other.attention or other.attention[-1].node in seen:
            continue
        attention = other.attention[-1]
        seen.add(attention.node)
        # Scores are [batch, tokens]: the attention and its own site must number the samples as this site does.
        lead = tuple(f for f in types.factors.resolve(attention.lead) if f in site.batch)
        if other.batch != site.batch or lead != site.batch:
            continue
        # A reshape across samples and tokens may make one factor of both: scores are laid out by factors.
        if set(site.batch) & (types.factors.atoms(attention.key_axis) | types.factors.atoms(attention.axis)):
            continue
        # A map that the site does not make itself (weights that are learned, say) is out of its graph's reach.
        if attention.map is not None and attention.map not in other.region:
            continue
        if attention.map is None and not attention.operands:  # a linear one has no map
            continue
        place = _place(types, attention.key_axis, site)
        if place is not None:
            keys[other.index] = ScoreSource(other.index, place or None)
        if reads_other_tokens(attention, types) and attention.axis == site.axis.factors:
            queries[other.index] = ScoreSource(other.index)
    return replace(site, score_by_keys=_nearest(keys, site, sites), score_by_queries=_nearest(queries, site, sites))


def reads_other_tokens(attention: Attention, types: AxisTypes) -> bool:
    """Whether an attention's keys are no queries of it: cross-attention."""
    return not types.factors.atoms(attention.key_axis) & types.factors.atoms(attention.axis)


def _place(types: AxisTypes, keys: Product, site: Site) -> tuple[int, int] | tuple[()] | None:
    """Where the site's tokens lie among the keys; the empty tuple: they are all; None: they are not there."""
    if keys == site.axis.factors:
        return ()
    parts, own, start = types.factors.segments(keys), types.factors.segments(site.axis.factors), 0
    for i, part in enumerate(parts):
        if parts[i : i + len(own)] == own:  # several where the tokens are joined too (registers before a picture)
            return start, start + site.axis.size
        start += types.factors.size(part)
    return None


def _nearest(able: dict[int, ScoreSource], site: Site, sites: tuple[Site, ...]) -> ScoreSource | None:
    own = [i for i in able if sites[i].block == site.block]
    for among in (own, list(able)):
        before = [i for i in among if i <= site.index]
        if before or among:
            return able[before[-1] if before else among[0]]
    return None
