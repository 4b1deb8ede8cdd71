"""What the sample calls of rules draw from."""

from random import Random


def sizes(rng: Random, count: int, *, one: bool = True) -> list[int]:
    """Sizes of ``count`` dimensions. One time in three all are equal: only then does a wrong alignment fit."""
    if rng.random() < 0.35:
        return [rng.randint(2, 4)] * count
    return [1 if one and rng.random() < 0.1 else rng.randint(2, 4) for _ in range(count)]


def shape(rng: Random, least: int = 1, most: int = 3) -> list[int]:
    """A shape of between ``least`` and ``most`` dimensions."""
    return sizes(rng, rng.randint(least, most))


def broadcast(rng: Random, whole: list[int]) -> list[int]:
    """A shape that broadcasts against ``whole``: some of its dimensions 1, some of the leading ones missing."""
    return [1 if rng.random() < 0.3 else s for s in whole][
        rng.randint(0, len(whole) - 1) if rng.random() < 0.5 else 0 :
    ]


def dim_of(rng: Random, rank: int) -> int:
    """A dimension, counted from either end."""
    return rng.randint(-rank, rank - 1)


def dims_of(rng: Random, rank: int, least: int = 1) -> list[int]:
    """Some dimensions in any order, each once, counted from either end."""
    chosen = rng.sample(range(rank), rng.randint(least, rank))
    return [d - rank if rng.random() < 0.5 else d for d in chosen]


def maybe(rng: Random, *values: object) -> tuple[object, ...]:
    """The values, or the first few of them: arguments that may be left out."""
    return values[: rng.randint(0, len(values))]
