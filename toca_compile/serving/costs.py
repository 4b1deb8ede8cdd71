"""Costs: what batches of a model cost, and how many requests it pays to work on at once."""

from collections.abc import Sequence

from toca_compile.runtime.clock import Clock

_SEEN = 8  # calls of a size, of which the fastest counts: a first one compiles, others share the machine
_PAYS = 1.1  # times the requests a second, or the wait of each for the others is not worth it


class Costs:
    """The seconds of calls that compute everything, by how many requests they were of.

    Where the device is busy with one request, a batch takes as many times longer as it has requests: then each waits
    for all others, and nobody gains. Small models, or large devices, take little more for several."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Clock]] = []
        self._least: dict[int, float] = {}
        self._seen: dict[int, int] = {}

    def note(self, requests: int, clock: Clock) -> None:
        """A call was made of so many requests. Nothing waits for it: it counts when it is done."""
        self._pending.append((requests, clock))
        done = [one for one in self._pending if one[1].is_over]
        self._pending = [one for one in self._pending if one not in done]
        for size, over in done:
            self._least[size] = min(over.seconds, self._least.get(size, over.seconds))
            self._seen[size] = self._seen.get(size, 0) + 1

    def at_once(self, sizes: Sequence[int]) -> int:
        """How many requests to work on at once: as many as the largest of ``sizes``, until smaller batches are known to
        do as well."""
        known = [size for size in sizes if self._seen.get(size, 0) >= _SEEN]
        if sizes[0] not in known:
            return sizes[-1]
        best = known[0]
        for size in known:
            if size / self._least[size] > _PAYS * best / self._least[best]:
                best = size
        return sizes[-1] if best == known[-1] else best
