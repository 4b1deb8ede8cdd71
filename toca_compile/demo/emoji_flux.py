"""The second trained model: a small FLUX that draws emoji by their names. Needs the ``demo`` extra."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.demo import shipped
from toca_compile.demo.noto_emoji import words
from toca_compile.quality.evaluation import Sampler

GUIDANCE = 3.0
SIDE = 32  # pixels of a picture
PATCH = 2
WORDS = 14  # text tokens; a shorter prompt is filled up with empty ones, and the prompt without words is all empty
PROMPTS = (
    "smileys & emotion, face-smiling, grinning face",
    "smileys & emotion, face-smiling, smiling face with halo",
    "smileys & emotion, face-glasses, smiling face with sunglasses",
    "smileys & emotion, face-negative, smiling face with horns",
    "smileys & emotion, cat-face, smiling cat face with open mouth",
    "smileys & emotion, face-costume, ghost",
    "smileys & emotion, heart, green heart",
    "smileys & emotion, heart, blue heart",
)


class Text(nn.Module):
    """A learned vector for each known word; to words it does not know it is deaf.

    Args:
        vocabulary: the words; the first is the empty one.
        width: of a vector.
    """

    def __init__(self, vocabulary: Sequence[str], width: int) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self._index = {word: i for i, word in enumerate(self.vocabulary)}
        self.table = nn.Embedding(len(self.vocabulary), width)

    def indices(self, prompts: Sequence[str]) -> Tensor:
        """Which words the prompts are made of: ``[prompts, WORDS]``, int64."""
        rows = [[self._index[w] for w in words(p) if w in self._index][:WORDS] for p in prompts]
        return torch.tensor([row + [0] * (WORDS - len(row)) for row in rows])

    def forward(self, indices: Tensor) -> dict[str, Tensor]:
        """What the transformer is told of the text: a token a word, and their mean."""
        tokens = self.table(indices)
        return {"encoder_hidden_states": tokens, "pooled_projections": tokens.mean(1)}


def positions(side: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Where tokens lie, for pictures of ``side`` pixels: image tokens where they would lie in one of ``SIDE``, text
    tokens nowhere."""
    grid = (torch.arange(side // PATCH, device=device) + 0.5) * (SIDE / side) - 0.5
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    return {"img_ids": image, "txt_ids": torch.zeros(WORDS, 3, device=device)}


def packed(pictures: Tensor) -> Tensor:
    """Pictures ``[b, 3, h, w]`` as tokens ``[b, (h w) / 4, 12]``, one a patch of 2×2."""
    return nn.functional.pixel_unshuffle(pictures, PATCH).flatten(2).mT


def unpacked(tokens: Tensor) -> Tensor:
    """The inverse of ``packed``, for square pictures."""
    side = round(tokens.shape[1] ** 0.5)
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (side, side)), PATCH)


def default_model() -> Path:
    """The trained model's folder (``examples/emoji_flux`` of a checkout).

    Raises:
        TocaError: there is none.
    """
    return shipped.folder("emoji_flux")


def is_model(path: Path) -> bool:
    """Whether a folder has text vectors beside its weights, as no other model here."""
    return (path / "text" / "vocabulary.json").exists()


def load(path: Path) -> tuple[Any, Any, Text]:
    """Transformer (float32, eval), scheduler and text vectors of a folder.

    Raises:
        TocaError: it holds no FluxTransformer2DModel with a scheduler.
    """
    from safetensors.torch import load_file

    model, scheduler = shipped.load(path, "FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler")
    vocabulary = json.loads((path / "text" / "vocabulary.json").read_text(encoding="utf-8"))
    text = Text(vocabulary, model.config.joint_attention_dim)
    weights = load_file(path / "text" / "model.safetensors")
    text.load_state_dict({name: value.float() for name, value in weights.items()})
    return model, scheduler, text.eval()


def noise_of(count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """What a batch begins with: ``[count, 3, side, side]``."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def sample(
    model: Callable[..., Any],
    scheduler: Any,
    text: Text,
    prompts: Sequence[str],
    steps: int,
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """Euler steps of the flow with guidance, on the device of the text's vectors, both halves of the pair in one batch;
    pictures in about [−1, 1], of the shape of the ``noise`` that they begin with (that of seed 0)."""
    device, count = text.table.weight.device, len(prompts)
    noise = noise_of(count) if noise is None else noise
    side, x = noise.shape[-1], packed(noise).to(device)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), device=device)
    with torch.inference_mode():
        told = text(text.indices([*prompts, *[""] * count]).to(device)) | positions(side, device)
        for t in shipped.begun(model, scheduler):
            sigma = (t / scheduler.config.num_train_timesteps).expand(2 * count)
            velocity = model(hidden_states=torch.cat([x, x]), timestep=sigma, **told).sample
            cond, uncond = velocity.chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
    return unpacked(x)


def prompts(count: int, first: int = 0) -> list[str]:
    """What a batch is asked for."""
    return [PROMPTS[(first + i) % len(PROMPTS)] for i in range(count)]


def model_and_sampler(
    path: Path | None = None, device: str = "cpu", first: int = 0, side: int = SIDE
) -> tuple[Any, Sampler]:
    """The trained model, and a sampler of it for ``evaluate`` and ``tune``. ``first``: prompt that a batch begins
    with; ``side``: of the pictures, in pixels."""
    model, scheduler, text = load(path or default_model())
    text.to(device)

    def sampler(model: Any, steps: int, seed: int, count: int) -> Tensor:
        return sample(model, scheduler, text, prompts(count, first), steps, noise=noise_of(count, seed, side))

    return model.to(device), sampler
