"""How far samples are from others: pair by pair, and as distributions."""

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB, mean over the samples ``[batch, …]``."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-12)
    return float((10 * torch.log10(peak**2 / error)).mean())


def feature_distance(a: Tensor, b: Tensor) -> float:
    """Mean ‖a − b‖ / ‖b‖ over pairs of feature vectors ``[n, d]``."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).mean())


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel inception distance: the unbiased squared MMD of two sets of features ``[n, d]`` under the kernel
    (x·y/d + 1)³ (Bińkowski et al., 2018, section 4)."""
    a, b = a.double(), b.double()
    n, m = len(a), len(b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    own = (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (n * (n - 1))
    other = (kernel(b, b).sum() - kernel(b, b).diagonal().sum()) / (m * (m - 1))
    return float(own + other - 2 * kernel(a, b).mean())
