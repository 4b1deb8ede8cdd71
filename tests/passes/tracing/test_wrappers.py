"""Wrappers: an op on a distributed tensor is traced to what each process does with its part."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import TIMES, steps
from tests.sampling import noise
from toca_compile import Fora

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_layer_of_distributed_weights_is_one_of_its_part(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model: nn.Module = randomize(PlainDiT(depth=3))
    plain = steps(model, noise(), TIMES)
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()})
    opt = toca_compile.optimize(model, Fora(8, 1), lowering="eager")
    torch.testing.assert_close(steps(opt, noise(), TIMES), plain, rtol=1e-5, atol=1e-5)
    (text,) = (t for name, t in toca_compile.explain(opt).graphs().items() if name == "capture")
    assert sum(text.count(f"= {op}(") for op in ("linear", "addmm", "mm")) == 3 * 5 + 4
    assert "DTensor" not in text
