"""HostKnown: timesteps on an accelerator, and what is made of them, whose numbers the host knows."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.apart import OnHost, apart, unread
from toca_compile.runtime import host_known
from toca_compile.runtime.host_known import HostKnown, known_to_host, plainly

TIMES = torch.tensor([999.0, 500.0, 1.0])

OPS: dict[str, Callable[[Any], Any]] = {
    "/": lambda t: t / 1000,
    "1 -": lambda t: 1 - t,
    "torch.mul": lambda t: torch.mul(t, 3),
    "-": lambda t: -t,
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "float": lambda t: t.float(),
    "to": lambda t: t.to("cpu", torch.float64),
    "expand": lambda t: t.expand(2, *t.shape),
    "[None]": lambda t: t[None],
    "[...]": lambda t: t[..., None],
    "flatten": lambda t: t.flatten(),
    "repeat": lambda t: t.reshape(-1).repeat(2),
    "cat": lambda t: torch.cat([t.reshape(-1), t.reshape(-1) + 1]),
    "clone": lambda t: t.clone(),
}


def known(times: Tensor = TIMES) -> Any:
    """Timesteps that lie elsewhere."""
    return HostKnown.of(times.clone(), times.clone().as_subclass(OnHost))


@given(st.lists(st.sampled_from(sorted(OPS)), max_size=5), st.integers(-3, 2))
def test_what_is_made_of_one_is_known_and_so_is_what_will_be_in_its_place(names: list[str], index: int) -> None:
    def made(t: Any) -> Any:
        for name in names:
            t = OPS[name](t)
        return t

    value = made(known()[index])
    assert isinstance(value, HostKnown)
    assert torch.equal(value.plain, made(TIMES[index]))
    assert torch.equal(value.host, made(TIMES[index]))
    told = list(value.ahead())
    assert len(told) == 3 - index % 3
    for (later, host), t in zip(told, TIMES[index:] if index >= 0 else TIMES[index % 3 :], strict=True):
        assert type(later) is Tensor
        assert torch.equal(later, made(t))
        assert torch.equal(host, made(t))


def test_a_loop_and_a_part_give_such() -> None:
    assert [float(t) for t in known()] == TIMES.tolist()
    later = known()[1:]
    assert [host.item() for _, host in later[0].ahead()] == [500.0, 1.0]
    assert [host.item() for _, host in (later / 1000)[0].ahead()] == pytest.approx([0.5, 0.001])


def test_the_host_does_not_wait_for_what_it_knows() -> None:
    with apart(), unread():
        t = known()[1]
        assert (float(t), int(t), t.item(), t.tolist(), t > 3, bool(t < 3)) == (500, 500, 500, 500, True, False)
        assert known().tolist() == [999, 500, 1]
        with pytest.raises(AssertionError, match="waits"):
            TIMES[1].item()


def test_a_table_on_the_host_is_asked_for_what_it_knows_of_a_timestep() -> None:
    table = torch.arange(1000.0).as_subclass(OnHost)
    t = known(torch.tensor([999, 500, 1]))[1]
    with apart():
        assert type(table[t]) is OnHost
        assert table[t] == 500
        t += 1
        assert table[t] == 501  # and otherwise it waits


@pytest.mark.parametrize(
    "op", [lambda t: t * torch.ones(3), lambda t: t.sin(), lambda t: torch.ones(3).to(t), lambda t: t[t > 3],
           lambda t: torch.rand_like(t), lambda t: torch.add(t, 1, out=torch.empty(3)), lambda t: t.data],
)  # fmt: skip
def test_what_is_made_otherwise_is_ordinary(op: Callable[[Any], Any]) -> None:
    assert type(op(known())) is Tensor


def _in_place(t: Any) -> None:
    t.add_(1)


def _by_a_view(t: Any) -> None:
    t[None].mul_(2)


def _by_the_plain_one(t: Any) -> None:
    t.plain.zero_()


@pytest.mark.parametrize("write", [_in_place, _by_a_view, _by_the_plain_one])
def test_who_writes_to_one_makes_it_unknown(write: Callable[[Any], None]) -> None:
    times = known()
    t, half = times[1], times[1] / 2
    write(t)
    assert t.host is None
    assert times.host is None
    assert half.host == 250
    assert list(half.ahead()) == []  # what would come is no longer what the host knows
    assert type(t + 1) is Tensor


def test_it_is_an_ordinary_tensor_to_others() -> None:
    times = known()
    for other in (copy.deepcopy(times), pickle.loads(pickle.dumps(times))):
        assert type(other) is Tensor
        assert torch.equal(other, TIMES)
    assert repr(times) == repr(TIMES)
    assert f"{times[1]:.2f}" == "500.00"
    with torch.no_grad():
        compiled = torch.compile(lambda t, x: (t.expand(2) / 1000).sin() * x, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(times[1], torch.ones(2)), torch.full((2,), 0.5).sin())


def test_which_timesteps_become_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_known, "has_accelerator", lambda: False)
    assert known_to_host(TIMES) is TIMES
    with apart():
        assert isinstance(known_to_host(TIMES), HostKnown)
    monkeypatch.setattr(host_known, "has_accelerator", lambda: True)
    assert isinstance(known_to_host(TIMES), HostKnown)  # it may be moved there
    for other in ([1, 2], None, torch.empty(3, device="meta")):
        assert known_to_host(other) is other
    with torch.inference_mode():  # of such nobody knows whether they were written to
        made = torch.ones(3)
    assert known_to_host(made) is made


def test_in_inference_mode_parts_are_known_and_what_is_computed_is_not() -> None:
    times = known()
    with torch.inference_mode():
        assert times[1].expand(2).host.tolist() == [500, 500]
        assert type(times[1] / 1000) is Tensor
        assert float(times[1] / 1000) == 0.5


def test_a_call_is_made_with_ordinary_tensors() -> None:
    t, x = known()[0], torch.ones(2)
    args, kwargs, told = plainly((x, t), {"again": t, "nested": {"t": t[None]}, "each": torch.stack(list(known()))})
    assert args[0] is x
    assert type(args[1]) is type(kwargs["nested"]["t"]) is Tensor
    assert kwargs["again"] is args[1]
    assert told[id(args[1])] is t
    assert type(kwargs["each"]) is Tensor
    assert len(told) == 2
