"""Models that tests share stay traced where all else of Dynamo is emptied, and are to each test as to the first."""

import torch
from torch._dynamo.utils import counters

from tests.models import PlainDiT
from tests.runs import TIMES, kinds, steps
from tests.sampling import noise
from tests.shared import Traced, empty_dynamo
from toca_compile import Fora


def test_a_shared_model_is_traced_once_and_as_it_was(traced: Traced) -> None:
    class Own(PlainDiT):
        """A class that no other test knows."""

    policy, outs = Fora(8, 4), []
    for _ in range(2):
        model, opt = traced(Own, policy, depth=1)
        outs.append(steps(opt, noise(), TIMES))
        assert kinds(opt) == "frrrfrrr"
        torch.nn.init.zeros_(model.head.weight)
        opt.policy = Fora(8, 2)
        steps(opt, noise(seed=1), TIMES[:3])  # abandoned
        empty_dynamo()
    assert torch.equal(*outs)
    assert counters["stats"]["unique_graphs"] == 1
    assert traced(Own, depth=1, which=1)[1] is not opt


def test_code_that_is_compiled_otherwise_is_not_kept() -> None:
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    for count in (1, 2):
        compiled(torch.ones(3))
        assert counters["stats"]["unique_graphs"] == count
        empty_dynamo()
