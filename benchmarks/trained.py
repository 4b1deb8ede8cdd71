"""The trained models of this repository, with what benchmarks need to know of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toca_compile.demo import emoji_flux, fashion_dit
from toca_compile.quality.evaluation import Sampler


@dataclass(frozen=True)
class Trained:
    """A model of ``examples/``.

    Attributes:
        title: what it is.
        sampling: its sampler and guidance, in words.
        steps: that it is usually sampled in.
        load: the model and its sampler. ``first``: which class or prompt a batch begins with.
        flow: whether it predicts the velocity of flow matching.
    """

    title: str
    sampling: str
    steps: int
    load: Callable[..., tuple[Any, Sampler]]
    flow: bool = False


TRAINED = {
    "fashion_dit": Trained(
        "The DiT of Fashion-MNIST", f"DDIM, guidance {fashion_dit.GUIDANCE}", 50, fashion_dit.model_and_sampler
    ),
    "emoji_flux": Trained(
        "The FLUX of emoji", f"Euler, guidance {emoji_flux.GUIDANCE}", 28, emoji_flux.model_and_sampler, flow=True
    ),
}
