"""Tokens: is there a budget at which computing chosen tokens between full steps beats the best forecast of as much
time? Simulated on the eager models, with oracles as upper bounds.

    python benchmarks/tokens.py forecasts oracles tried  # about an hour and a half on one core
    python benchmarks/tokens.py                          # only write the tables

Between full steps what all blocks add to the stream is forecast; at a share of the tokens something else is put there.
An oracle computes the whole step, picks the tokens where the forecast is most wrong (of the guided prediction), and
puts what was computed, so that neither the choice nor what the tokens see of others is worse for not having computed
the rest. It is charged those tokens' share of the FLOPs alone, which no kernel reaches. What is charged is held against
the best forecast with as many more full steps (rule, schedule, corrector; chosen on another seed). PSNR to the uncached
samples of two held-out seeds. What has no oracle (``tried``) chooses by what is known, and its tokens see the others
as forecast. A run that was cut off goes on where it was. ``results/tokens.{csv,md}``; ``token_run.py`` is one run.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from common import RESULTS
from token_run import Base, Model, Place
from trained import TRAINED

CALIBRATION, CALIBRATED = (100,), 4  # samples of the first classes and prompts
SEEDS, SAMPLES = (0, 1), 2  # of those that follow
SHARES = (0.1, 0.25, 0.5)
TRIED = {"fashion_dit": ("Newton o2", "Newton o3", "FoCa"), "emoji_flux": ("line", "Taylor o2", "HiCache", "FoCa")}
KAPPAS = {"fashion_dit": (0.25, 0.5), "emoji_flux": (0.0, 0.25, 0.5)}
DENSE = {"fashion_dit": 20, "emoji_flux": 16}  # with more full steps FoCa's rule is best on both, and alone is tried
FULL = {"fashion_dit": (17, 10, 7), "emoji_flux": (10, 6, 4)}  # full steps that tokens are added to: about 3, 5 and 7 ×
COUNTS = {
    "fashion_dit": (5, 7, 8, 9, 10, 11, 12, 14, 17, 20, 24, 28, 34),
    "emoji_flux": (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20),
}
FOUND = RESULTS / "tokens.csv"
ORACLES = {
    "every step, by error": Place(),
    "every step, by error up to the next full one": Place(by="interval"),
    "every step, by error of the whole run": Place(by="run"),
    "any step and token, by error": Place(by="anywhere"),
    "every step, by error, kept": Place(keep=True),
    "any step and token, by error, kept": Place(by="anywhere", keep=True),
    "any step and token, by error, all steps alike, kept": Place(by="alike", keep=True),
    "any step, whole pictures by error, kept": Place(by="pictures", keep=True),
    "any step and token, by the lower order, kept": Place(by="guess", keep=True),
    "the step before a full one": Place("before"),
    "the first fifth of the run": Place("first"),
    "the last fifth of the run": Place("last"),
    "the first quarter of the blocks": Place(blocks="first"),
    "the last quarter of the blocks": Place(blocks="last"),
    "cluster means of the error": Place(spread="mean"),
    "cluster directions, own lengths": Place(spread="direction"),
    "high-frequency tokens": Place(by="frequency"),
    "foreground tokens": Place(by="foreground"),
    "the conditional half": Place(half="c"),
    "the conditional half, the other moved along": Place(half="c → u"),
    "the unconditional half": Place(half="u"),
    "the unconditional half, the other moved along": Place(half="u → c"),
}
REAL = {
    "any step and token, by error, kept, seeing forecasts": Place(by="anywhere", keep=True, sees="forecast"),
    "any step and token, by the lower order, kept, seeing forecasts": Place(by="guess", keep=True, sees="forecast"),
    "as many at each step, by error, kept": Place(as_many=True, keep=True, sees="forecast"),
    "as many at each step, by the lower order, kept": Place(by="guess", as_many=True, keep=True, sees="forecast"),
    "as many at each step, by what was missed before, kept": Place(
        by="missed", as_many=True, keep=True, sees="forecast"
    ),
    "as many at each step, by the last slope, kept": Place(by="slope", as_many=True, keep=True, sees="forecast"),
    "as many at each step, by chance, kept": Place(by="random", as_many=True, keep=True, sees="forecast"),
    "as many at each step, by error, kept, seeing caches": Place(as_many=True, keep=True, sees="cached"),
    "as many at each step, by the lower order, kept, seeing caches": Place(
        by="guess", as_many=True, keep=True, sees="cached"
    ),
    "by error, seeing forecasts": Place(sees="forecast"),
    "by what was missed at the last full step": Place(by="missed", sees="forecast"),
    "by the last slope": Place(by="slope", sees="forecast"),
    "by chance": Place(by="random", sees="forecast"),
    "one token a cluster of like slopes, its change spread": Place(spread="nearest", sees="forecast"),
}


class Row(NamedTuple):
    """One line of the results. ``full``: full steps. ``charged``: in full steps."""

    model: str
    place: str
    full: int
    share: float
    charged: float
    dB: float
    base: str


def laid(steps: int, count: int) -> dict[str, tuple[int, ...]]:
    """So many full steps, from the first to the last but one: evenly, or the second at once."""
    last = steps - 2
    even = {round(i * last / (count - 1)) for i in range(count)}
    second = {0, *(round(1 + i * (last - 1) / (count - 2)) for i in range(count - 1))}
    return {"even": tuple(sorted(even)), "second": tuple(sorted(second))}


def based(told: str, steps: int, count: int) -> Base:
    """The forecast that a row names."""
    rule, kappa, when = told.split(", ")
    return Base(laid(steps, count)[when], rule, float(kappa))


def forecasts(name: str, rows: list[Row]) -> Iterator[Row]:
    """With each number of full steps the forecast that is best on the calibration seed, held out."""
    judge, other = Model(name, CALIBRATION, CALIBRATED), Model(name, SEEDS, SAMPLES, CALIBRATED)
    for count in COUNTS[name]:
        if any(row[:3] == (name, "forecast", count) for row in rows):
            continue
        rules = TRIED[name] if count <= DENSE[name] else ("FoCa",)
        ways = [f"{r}, {k}, {w}" for r in rules for k in KAPPAS[name] for w in laid(judge.steps, count)]
        best = max(ways, key=lambda way: judge.run(based(way, judge.steps, count))[0])
        dB, charged = other.run(based(best, judge.steps, count))
        yield Row(name, "forecast", count, 0.0, charged, dB, best)


def oracles(name: str, rows: list[Row]) -> Iterator[Row]:
    """Every place, held out."""
    return _places(name, rows, ORACLES)


def tried(name: str, rows: list[Row]) -> Iterator[Row]:
    """What needs no oracle, and the oracle whose tokens see what there is."""
    return _places(name, rows, REAL)


def _places(name: str, rows: list[Row], places: dict[str, Place]) -> Iterator[Row]:
    model = Model(name, SEEDS, SAMPLES, CALIBRATED)
    best = {row.full: row.base for row in rows if row[:2] == (name, "forecast")}
    for what, place in places.items():
        for count in FULL[name]:
            for share in shares(place):
                if any(row[:4] == (name, what, count, share) for row in rows):
                    continue
                dB, charged = model.run(based(best[count], model.steps, count), place, share)
                yield Row(name, what, count, share, charged, dB, best[count])


def shares(place: Place) -> tuple[float, ...]:
    """Of the tokens; of a part of the blocks, or of one half of a pair, all of them, too."""
    return (*SHARES, 1.0) if place.blocks != "all" or place.half != "both" else SHARES


def gain(row: Row, rows: Sequence[Row]) -> float:
    """Of a row over the best forecast that costs as much, in dB: between two numbers of full steps, on the line. Of one
    that costs more than any forecast sampled, over that of most steps.

    Raises:
        ValueError: it costs less than any.
    """
    known = sorted((r.full, r.dB) for r in rows if r[:2] == (row.model, "forecast"))
    best = [(full, max(dB for f, dB in known if f <= full)) for full, _ in known]
    for (before, low), (after, high) in pairwise(best):
        if before <= row.charged <= after:
            return row.dB - low - (high - low) * (row.charged - before) / (after - before)
    if not best or row.charged < best[0][0]:
        raise ValueError(f"no forecast of {row.charged} full steps or fewer was sampled")
    return row.dB - best[-1][1]


def table(rows: Sequence[Row]) -> None:
    """``results/tokens.md``."""
    lines = [
        "# tokens",
        "",
        "Tokens computed between full steps, simulated (`python benchmarks/tokens.py`): dB over the best forecast that "
        "costs as much, with 10, 25 and 50 % of the tokens (of parts of the blocks, or one half of a pair, with all of "
        "them, too). *Oracles* choose by the true error and put the true value, and are charged the tokens' share of "
        "the FLOPs alone: below 0 a place is ruled out, above it nothing is promised. PSNR to the uncached samples of "
        f"{len(SEEDS)} held-out seeds of {SAMPLES}; a dot or no row: not sampled. All rows: "
        "[tokens.csv](tokens.csv); what follows: [policies.md](../policies.md).",
    ]
    for name, trained in TRAINED.items():
        own = [row for row in rows if row.model == name]
        line = sorted((row.full, row.dB, row.base) for row in own if row.place == "forecast")
        if not line:
            continue
        told = ", ".join(f"{full}: {dB:.1f}" for full, dB, _ in line)
        heads = [f"{full} full steps ({dB:.1f} dB: {base})" for full, dB, base in line if full in FULL[name]]
        lines += [
            "",
            f"## {trained.title}",
            "",
            f"{trained.sampling}, {trained.steps} steps. dB of the forecasts held ",
        ]
        lines[-1] += f"against, by full steps: {told}. In brackets: without tokens, by which rule and κ, how laid."
        for kind, places in (
            ("oracle", ORACLES),
            ("values that are computed; *by error* and *as many* ask an oracle which or how many", REAL),
        ):
            lines += ["", f"| {kind} | {' | '.join(heads)} |", "|" + " --- |" * (1 + len(heads))]
            for what, place in places.items():
                gains = {(row.full, row.share): f"{gain(row, own):+.1f}" for row in own if row.place == what}
                cells = [
                    " / ".join(gains.get((full, share), "·") for share in shares(place)) for full in sorted(FULL[name])
                ]
                if gains:
                    lines.append(f"| {what} | {' | '.join(cells)} |")
    (RESULTS / "tokens.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read() -> list[Row]:
    """What earlier runs found."""
    if not FOUND.exists():
        return []
    with FOUND.open(newline="") as file:
        kinds = Row.__annotations__.values()
        found = [Row(*(kind(cell) for kind, cell in zip(kinds, line, strict=True))) for line in [*csv.reader(file)][1:]]
    return sorted(found)


def write(row: Row) -> None:
    """Appends a row, so that two runs may write at once."""
    begun = FOUND.exists()
    with FOUND.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([row] if begun else [Row._fields, row])
    print(row, flush=True)


def main() -> None:
    """Sample, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", choices=["forecasts", "oracles", "tried", []])
    parser.add_argument("--models", choices=list(TRAINED), nargs="+", default=list(TRAINED))
    given = parser.parse_args()
    for name in given.models:
        for work in (forecasts, oracles, tried):
            if work.__name__ in given.work:
                for row in work(name, read()):
                    write(row)
    table(read())


if __name__ == "__main__":
    main()
