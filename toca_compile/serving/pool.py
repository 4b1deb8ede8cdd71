"""Pool: the caches of many requests. A slot is one request's, and a batch is gathered from slots by their numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Name = tuple[Any, ...]  # of a buffer: what it is, whose, and which of several
Key = tuple[Name, "Stored"]  # policies may keep different things of one name


@dataclass(frozen=True)
class Place:
    """Where the samples lie in a buffer: in the dimension ``dim``, with ``before`` places for each. Of a batch of
    requests that have ``rows`` samples each, first come the first samples of all, then the second."""

    dim: int
    before: int

    def by_request(self, buffer: Tensor, requests: int, rows: int) -> Tensor:
        """A view ``[requests, rows, …]`` of a buffer."""
        after = buffer.shape[self.dim] // (self.before * rows * requests)
        apart = buffer.unflatten(self.dim, (self.before, rows, requests, after))
        return apart.movedim((self.dim + 2, self.dim + 1), (0, 1))


@dataclass(frozen=True)
class Stored:
    """What a slot holds of a buffer: how many numbers of which type, and where. ``ring``: how many places each of its
    ``rows`` samples is a ring of (1: none); ``stamp``: whether the numbers are steps."""

    numbers: int
    dtype: torch.dtype
    device: torch.device
    rows: int = 1
    ring: int = 1
    stamp: bool = False

    @property
    def bytes(self) -> int:
        """Of one slot."""
        return self.numbers * self.dtype.itemsize


class Pool:
    """Slots of one kind of requests: each holds the same buffers."""

    def __init__(self) -> None:
        self._tensors: dict[Key, Tensor] = {}
        self._free: list[int] = []
        self.size = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(stored.bytes for _, stored in self._tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all."""
        return self.size * self.slot_bytes

    @property
    def used(self) -> int:
        """How many slots are taken."""
        return self.size - len(self._free)

    def holds(self, key: Key) -> bool:
        """Whether slots hold a buffer."""
        return key in self._tensors

    def declare(self, keys: Iterable[Key]) -> None:
        """Let slots hold these buffers too, zero in those that are taken."""
        for key in keys:
            if key not in self._tensors:
                self._tensors[key] = self._zeros(key[1], self.size)

    def grow(self, slots: int) -> None:
        """Have so many slots."""
        for key, old in self._tensors.items():
            self._tensors[key] = self._zeros(key[1], slots)
            self._tensors[key][: self.size] = old
        self._free += range(self.size, slots)
        self.size = slots

    def clear(self) -> None:
        """Free the memory; no slot may be taken. What slots hold is to be declared anew."""
        assert not self.used
        self._tensors, self._free, self.size = {}, [], 0

    def take(self) -> int | None:
        """A slot, all zero; None where none is free."""
        if not self._free:
            return None
        slot = self._free.pop()
        for tensor in self._tensors.values():
            tensor[slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        """A request is over."""
        self._free.append(slot)

    def gather(self, key: Key, into: Tensor, slots: Tensor, turns: Sequence[int]) -> None:
        """Copy what slots hold of a buffer.

        Args:
            into: ``[requests, …]``.
            slots: int64 ``[requests]``.
            turns: by how much each request's stamps are late, or its ring is turned, against the batch's.
        """
        flat, rows = self._rows(key, slots, turns)
        found = flat.index_select(0, rows).view(into.shape)
        if key[1].stamp and any(turns):
            found -= self._late(turns, into)
        into.copy_(found)

    def scatter(self, key: Key, values: Tensor, slots: Tensor, turns: Sequence[int]) -> None:
        """Copy a buffer back; as ``gather``."""
        if key[1].stamp and any(turns):
            values = values + self._late(turns, values)
        flat, rows = self._rows(key, slots, turns)
        flat.index_copy_(0, rows, values.reshape(len(rows), -1))

    def _rows(self, key: Key, slots: Tensor, turns: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A buffer of all slots, and which of its rows are those of a batch, in order. Where rings are turned, each of
        their places is a row."""
        stored, tensor = key[1], self._tensors[key]
        if stored.ring == 1 or not any(turns):
            return tensor, slots
        by = torch.tensor(turns, device=slots.device)[:, None]
        place = (torch.arange(stored.ring, device=slots.device) + by) % stored.ring
        sample = slots[:, None] * stored.rows + torch.arange(stored.rows, device=slots.device)
        rows = sample[:, :, None] * stored.ring + place[:, None, :]
        return tensor.view(-1, stored.numbers // (stored.rows * stored.ring)), rows.reshape(-1)

    @staticmethod
    def _late(turns: Sequence[int], like: Tensor) -> Tensor:
        by = torch.tensor(turns, dtype=like.dtype, device=like.device)
        return by.view(-1, *[1] * (like.dim() - 1))

    @staticmethod
    def _zeros(stored: Stored, slots: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(slots, stored.numbers, dtype=stored.dtype, device=stored.device)
