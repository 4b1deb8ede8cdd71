"""Pool: what slots hold is gathered as a batch needs it, and written back."""

import torch

from toca_compile.serving.pool import Place, Pool, Stored


def test_samples_are_found_wherever_they_lie() -> None:
    """Of two requests with two samples each: first come the first samples of both."""
    samples = torch.arange(4)
    for dim, before, buffer in [
        (0, 1, samples[:, None, None].expand(4, 3, 5)),
        (1, 1, samples[None, :, None].expand(3, 4, 5)),
        (1, 3, samples[None, None, :, None].expand(5, 3, 4, 2).reshape(5, 24)),
    ]:
        found = Place(dim, before).by_request(buffer, 2, 2)
        assert found.shape[:2] == (2, 2)
        numbers = found.flatten(2)
        assert bool((numbers == torch.tensor([[0, 2], [1, 3]])[..., None]).all())


def test_a_slot_is_zero_when_it_is_taken_and_others_stay() -> None:
    key = ("a", 0, 0), Stored(3, torch.float32, torch.device("cpu"))
    pool = Pool()
    pool.declare([key])
    assert pool.take() is None
    pool.grow(2)
    first, second = pool.take(), pool.take()
    assert {first, second} == {0, 1}
    assert pool.take() is None
    values = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    pool.scatter(key, values, torch.tensor([first, second]), [0, 0])
    pool.grow(4)
    late = (("b", 0, 0), Stored(2, torch.float32, torch.device("cpu")))
    pool.declare([late])
    assert (pool.used, pool.slot_bytes, pool.bytes) == (2, 20, 80)
    into = torch.empty(3, 3)
    pool.gather(key, into, torch.tensor([second, first, first]), [0, 0, 0])
    assert into.tolist() == [[4, 5, 6], [1, 2, 3], [1, 2, 3]]
    assert first is not None
    pool.give_back(first)
    assert pool.take() == first
    pool.gather(key, into, torch.tensor([second, first, first]), [0, 0, 0])
    assert into.tolist() == [[4, 5, 6], [0, 0, 0], [0, 0, 0]]


def test_stamps_are_told_in_the_count_of_the_batch() -> None:
    key = ("stamp", 0, 0), Stored(2, torch.int32, torch.device("cpu"), stamp=True)
    pool = Pool()
    pool.declare([key])
    pool.grow(2)
    pool.scatter(key, torch.tensor([[5, 6], [8, 9]], dtype=torch.int32), torch.tensor([0, 1]), [0, 0])
    into = torch.empty(2, 2, dtype=torch.int32)
    pool.gather(key, into, torch.tensor([0, 1]), [0, 3])  # the second computed all three steps later
    assert into.tolist() == [[5, 6], [5, 6]]
    into[:, 0] = 7
    pool.scatter(key, into, torch.tensor([0, 1]), [0, 3])
    pool.gather(key, into, torch.tensor([0, 1]), [0, 0])
    assert into.tolist() == [[7, 6], [10, 9]]


def test_rings_are_turned_to_the_place_of_the_batch() -> None:
    """Each sample has one of its own; the last is written where the batch's first would."""
    key = ("ring", 0, 1), Stored(2 * 3 * 1, torch.float32, torch.device("cpu"), rows=2, ring=3)
    pool = Pool()
    pool.declare([key])
    pool.grow(2)
    own = torch.tensor([[[0.0, 1, 2], [10, 11, 12]], [[2, 0, 1], [12, 10, 11]]])  # the second is turned by one
    pool.scatter(key, own, torch.tensor([0, 1]), [0, 0])
    into = torch.empty(2, 2, 3)
    pool.gather(key, into, torch.tensor([0, 1]), [0, 1])
    assert into.tolist() == [[[0, 1, 2], [10, 11, 12]]] * 2
    into[:, :, 0] = 5
    pool.scatter(key, into, torch.tensor([0, 1]), [0, 1])
    pool.gather(key, into, torch.tensor([0, 1]), [0, 0])
    assert into.tolist() == [[[5, 1, 2], [5, 11, 12]], [[2, 5, 1], [12, 5, 11]]]
