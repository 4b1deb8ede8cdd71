"""What a version of torch cannot do."""

import pytest
import torch

LOSES_TRANSFORMS = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
"""Tracing loses sight of what a transform of functions makes: a model with one is refused."""

needs_transforms = pytest.mark.skipif(
    LOSES_TRANSFORMS, reason="torch before 2.13 loses sight of what torch.vmap makes: such a model is refused"
)


def newer(version: str) -> bool:
    """Whether torch is this version or a later one."""
    return bool(torch.torch_version.TorchVersion(torch.__version__) >= version)
