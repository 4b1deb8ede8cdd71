"""What ``evaluate``, ``tune`` and comparisons can be told beside the model, its sampler and what to look at."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from torch import Tensor

from toca_compile.errors import PolicyError, TocaError
from toca_compile.ir.anchors import MAX_ANCHORS
from toca_compile.ir.fields import Checked, Number, Seed, Steps, Threshold, Whole

S = TypeVar("S", bound="Settings")
Pictures = Annotated[int, Whole(1, 2**31 - 1)]
Trials = Annotated[int, Whole(0, 2**31 - 1)]
Workers = Annotated[int, Whole(0, 4096)]
Seconds = Annotated[float, Number(0, math.inf)]


@dataclass(frozen=True)
class Settings(Checked):
    """Base of what can be set: the numbers are checked here, when they are given."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except PolicyError as error:  # what all checked fields raise; no policy is at fault here
            raise TocaError(str(error)) from None


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How pictures are sampled, whatever they are sampled for.

    Args:
        steps: model calls of one run, of the uncached reference and of every policy.
        seeds: at least one; the spread is that over them.
        samples: pictures a seed.
        lowering: as in ``optimize``; with ``"inductor"`` the uncached model is compiled too.
        peak: of a sample's values, from the least to the largest, for PSNR.
        console: a rich console to show progress and results on.

    Raises:
        TocaError: a setting holds what it may not, or settings contradict each other.
    """

    steps: Steps = 50
    seeds: tuple[Seed, ...] = (0, 1, 2)
    samples: Pictures = 64
    lowering: str = "inductor"
    peak: Threshold = 2.0
    console: Any = None

    def check(self) -> None:
        if not self.seeds:
            raise TocaError("seeds must name at least one seed, not none")


@dataclass(frozen=True)
class EvaluationSettings(SamplingSettings):
    """How ``evaluate`` samples and judges.

    Args:
        steps, seeds, samples, lowering, peak, console: as in ``SamplingSettings``.
        batch: pictures at once, a divisor of ``samples``.
        fewer: step counts of the uncached rows that policies are held against.
        features: of pictures ``[n, …]``, ``[n, d]``: for the feature distance and, with ``real``, KID.
        real: features of real pictures ``[m, d]``.
        accuracy: share of a seed's ``samples`` that are what they should be.
        others: rows by name that no policy makes: a model to sample with, made when its turn comes. It may have a
            ``reset()``, called before each batch, and must state its ``flop_speedup``.
        workers: processes on the machines of Ray (the extra ``scale``), which is started if it does not run, that
            sample the batches; 0: this process does. Samples are the same; latencies are then those of a worker beside
            the others.

    Raises:
        TocaError: a setting holds what it may not, or ``samples`` is no multiple of ``batch``.
    """

    batch: Pictures = 16
    fewer: tuple[Steps, ...] = (25, 17, 13, 10)
    features: Callable[[Tensor], Tensor] | None = None
    real: Tensor | None = field(default=None, repr=False, compare=False)
    accuracy: Callable[[Tensor], float] | None = None
    others: Mapping[str, Callable[[], Any]] | None = None
    workers: Workers = 0

    def check(self) -> None:
        super().check()
        if self.samples % self.batch:
            raise TocaError(f"samples must be a multiple of batch, not {self.samples} and {self.batch}")


@dataclass(frozen=True)
class SearchSettings(SamplingSettings):
    """How a search samples, and when it stops.

    Args:
        steps, seeds, samples, lowering, peak, console: as in ``SamplingSettings``. Trials are judged on these seeds;
            judge the result on others. A latency target needs ``lowering="inductor"``.
        seconds, trials: stop after so long, or after so many samplings that were not known yet.

    Raises:
        TocaError: a setting holds what it may not.
    """

    seeds: tuple[Seed, ...] = (100,)
    samples: Pictures = 8
    lowering: str = "eager"
    seconds: Seconds = 1200.0
    trials: Trials | None = None


@dataclass(frozen=True)
class TuningSettings(SearchSettings):
    """How ``tune`` samples, and when it stops searching.

    Args:
        steps, seeds, samples, lowering, peak, console, seconds, trials: as in ``SearchSettings``.
        workers: processes on the machines of Ray (the extra ``scale``) that sample as many trials at once; 0: this
            process does, one after the other. With the same number of trials the same policy is found. None for a
            latency target, whose trials are timed with nothing beside them.

    Raises:
        TocaError: a setting holds what it may not.
    """

    workers: Workers = 0


@dataclass(frozen=True)
class PlanningSettings(SearchSettings):
    """How ``plan`` samples and searches, and when it stops.

    Args:
        steps, seeds, samples, lowering, peak, console, seconds: as in ``SearchSettings``.
        trials: samplings at most (None: 200), those that are known already among them: the search cools down over
            them, so that one that was cut off by ``seconds`` goes on as if it had not been.
        kept: full steps whose values a forecast may use.
        seed: of the search's own choices.

    Raises:
        TocaError: a setting holds what it may not.
    """

    trials: Trials | None = 200
    kept: Annotated[int, Whole(1, MAX_ANCHORS)] = 3
    seed: Seed = 0


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """How samplings are put side by side.

    Args:
        steps: model calls of one sampling.
        samples: how many at once, where the call of a pipeline does not say it.
        repeats: timed samplings a row; one more before them compiles.
        seed: of the noise, the same for all rows.
        device: where the model is.
        out: folder for the pictures, one file a row; None: none are written.
        lowering: as in ``optimize``; the uncached model is compiled where it is ``"inductor"``.

    Raises:
        TocaError: a setting holds what it may not.
    """

    steps: Steps = 50
    samples: Pictures = 8
    repeats: Pictures = 3
    seed: Seed = 0
    device: str = "cpu"
    out: Path | None = None
    lowering: str = "inductor"


def overridden(settings: S, overrides: Mapping[str, Any]) -> S:
    """The settings with some of them replaced, by name.

    Raises:
        TocaError: there is no such setting, or it may not hold that.
    """
    names = [f.name for f in fields(settings)]
    unknown = [name for name in overrides if name not in names]
    if unknown:
        raise TocaError(f"there is no setting {unknown[0]!r}; {type(settings).__name__} has {', '.join(names)}")
    return replace(settings, **overrides)
