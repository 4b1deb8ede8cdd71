"""Scores: what ranks the tokens of a site. Each says where it is read from; how it is measured stands in
``passes/variants/measure_scores.py``."""

from dataclasses import dataclass

from toca_compile.ir.types import ScoreSource, Site


@dataclass(frozen=True)
class Score:
    """One way to rank tokens. A ``measured`` one is read in the model, at steps that compute all tokens; the others are
    functions of step and token, by the op ``by_token`` or alike. ``what`` completes "no … runs over the tokens"."""

    name: str
    measured: bool = True
    what: str = "self-attention"
    by_token: str | None = None

    def source(self, site: Site) -> ScoreSource | None:
        """The site in which the score of this site's tokens is read; None where nothing tells it."""
        return site.score_by_keys if self.measured else None

    def tokens(self, site: Site) -> tuple[int, ...]:
        """The factors that the score of a source runs over."""
        return site.attention[-1].key_axis

    def row_flops(self, stride: int) -> int | None:
        """Every how many-th query row is multiplied with the keys once more to measure it; None: none is."""
        return None


@dataclass(frozen=True)
class ReceivedScore(Score):
    """Of a map of queries and keys: what each key receives."""

    def row_flops(self, stride: int) -> int | None:
        return stride


@dataclass(frozen=True)
class EntropyScore(Score):
    """Of the rows of a cross-attention: how each query's attention is spread."""

    what: str = "cross-attention"

    def source(self, site: Site) -> ScoreSource | None:
        return site.score_by_queries

    def tokens(self, site: Site) -> tuple[int, ...]:
        return site.attention[-1].axis

    def row_flops(self, stride: int) -> int | None:
        return 1


@dataclass(frozen=True)
class ErrorScore(Score):
    """Of the site itself: what its forecast missed."""

    def source(self, site: Site) -> ScoreSource | None:
        return ScoreSource(site.index)

    def tokens(self, site: Site) -> tuple[int, ...]:
        return site.axis.factors


SCORES = {
    score.name: score
    for score in (
        ReceivedScore("attention"),
        EntropyScore("entropy"),
        Score("v_norm"),
        Score("k_norm"),
        ErrorScore("error"),
        Score("random", measured=False, by_token="random_scores"),
        Score("none", measured=False),
    )
}
