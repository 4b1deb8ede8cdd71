"""An optimised model's weights: what puts others in their place, as it may with torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import optimized
from tests.sampling import noise
from toca_compile import Fora

GIVEN = (noise(), torch.full((2,), 500), torch.arange(2))
OTHERS: dict[str, Callable[[Any], Any]] = {
    "optimize": lambda model: optimized(model, Fora(4, 4)),
    "torch.compile": lambda model: torch.compile(
        model, backend="toca", options={"policy": Fora(4, 4), "lowering": "eager"}
    ),
    "compile": lambda model: (
        model.compile(backend="toca", options={"policy": Fora(4, 4), "lowering": "eager"}),
        model,
    )[1],
}


@pytest.fixture
def swapping() -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("entry", OTHERS)
@torch.no_grad()
def test_parameters_that_are_swapped(entry: str) -> None:
    """What keeps a tensor's address weakly lets torch swap no other for it."""
    model = randomize(PlainDiT())
    opt = OTHERS[entry](model)
    for _ in range(4):
        opt(*GIVEN)
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
    for _ in range(4):
        torch.testing.assert_close(opt(*GIVEN), model.forward(*GIVEN))
    model.double()
    given = (GIVEN[0].double(), *GIVEN[1:])
    for _ in range(4):
        torch.testing.assert_close(opt(*given), model.forward(*given))


@torch.no_grad()
def test_a_functional_call_takes_the_names_of_the_optimised_model() -> None:
    model = randomize(PlainDiT())
    opt = optimized(model, Fora(4, 4))
    others = {name: 1.5 * value for name, value in model.named_parameters()}
    wanted = functional_call(model, others, GIVEN)
    for _ in range(4):
        named = {name: others[name.removeprefix("_orig_mod.")] for name, _ in opt.named_parameters()}
        assert torch.equal(functional_call(opt, named, GIVEN), wanted)
    opt.reset()
    assert torch.equal(opt(*GIVEN), model(*GIVEN))
    with pytest.raises(TypeError, match=r"'positions'.*named_parameters\(\).*'_orig_mod\.positions'"):
        functional_call(opt, others, GIVEN)
    assert torch.equal(functional_call(toca_compile.restore(opt), others, GIVEN), wanted)
