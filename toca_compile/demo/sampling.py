"""What the commands sample: the shipped model, a pipeline of diffusers, or what a function of the user's makes."""

import inspect
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.demo import emoji_flux, fashion_dit
from toca_compile.demo.load_model import imported
from toca_compile.diffusers import attach, is_pipeline, transformers_of
from toca_compile.errors import TocaError
from toca_compile.model import OptimizedModel
from toca_compile.progress import working
from toca_compile.quality.evaluation import Sampler

PROMPT = "a cat in a library"

NAMES = (
    "a folder or hub id of a diffusers pipeline; the folder of a DiTTransformer2DModel with scheduler/ in it, or as "
    "examples/train_emoji_flux.py writes it; or package.module:factory, a function that returns a pipeline, a pipeline "
    "with the arguments of its call (a dictionary), or a model with its sampler (a function of model, steps, seed and "
    "count)"
)


@dataclass(frozen=True)
class Sampling:
    """A model with its sampler.

    Attributes:
        model: in eval mode.
        sampler: as ``evaluate`` and ``tune`` take it.
        peak: of a sample's values, from the least to the largest.
        shipped: whether it draws what the shipped model draws, so that the classifier can judge it.
    """

    model: nn.Module
    sampler: Sampler
    peak: float = 2.0
    shipped: bool = False


def load_sampling(name: str | None, device: str = "cpu", prompt: str = PROMPT) -> Sampling:
    """What ``name`` says (``NAMES``); None: the shipped model.

    Raises:
        TocaError: there is no such model, or it is none that can be sampled.
    """
    known = name is None or Path(name).is_dir() or ":" in name
    if not known and (not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).endswith(".json")):
        raise TocaError(f"{name} is no folder, no hub id (owner/name) and no package.module:factory")
    check_device(device)
    with working(f"loading {name or 'the model'}"):
        return _loaded(name, device, prompt)


def _loaded(name: str | None, device: str, prompt: str) -> Sampling:
    if name is None:
        return _trained_here(fashion_dit.default_model(), device)
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").exists():
            return _trained_here(Path(name), device)
    elif ":" in name:
        return _made(name, imported(name), device, prompt)
    return _of_pipeline(_from_diffusers(name), {}, device, prompt)


def load_pipeline(name: str, device: str = "cpu") -> Any:
    """A pipeline of diffusers: from a folder or hub id, or what ``package.module:factory`` returns.

    Raises:
        TocaError: there is none.
    """
    check_device(device)
    pipe = imported(name) if ":" in name and not Path(name).is_dir() else _from_diffusers(name)
    if not is_pipeline(pipe):
        raise TocaError(f"{name} must return a pipeline, not {type(pipe).__name__}")
    return pipe.to(device) if hasattr(pipe, "to") else pipe


def check_device(name: str) -> None:
    """See whether anything can be put onto a device.

    Raises:
        TocaError: nothing can.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise TocaError(f"device {name!r} cannot be used: {_first_line(error)}") from error


def _from_diffusers(name: str) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is wrong is said below, in one line
    try:
        return DiffusionPipeline.from_pretrained(name, low_cpu_mem_usage=False)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise TocaError(f"{name} cannot be loaded as a diffusers pipeline: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(before)


def _trained_here(path: Path, device: str) -> Sampling:
    """A model of the kinds that this project trains."""
    if emoji_flux.is_model(path):
        return Sampling(*emoji_flux.model_and_sampler(path, device))
    model, sampler = fashion_dit.model_and_sampler(path, device)
    config = model.config
    return Sampling(model, sampler, shipped=(config.in_channels, config.sample_size) == (1, 28))


def _made(name: str, made: Any, device: str, prompt: str) -> Sampling:
    first, second = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if is_pipeline(first) and (second is None or isinstance(second, Mapping)):
        return _of_pipeline(first, dict(second or {}), device, prompt)
    if isinstance(first, nn.Module) and callable(second):
        return Sampling(first.to(device).eval(), second)
    raise TocaError(
        f"{name} must return a pipeline, a pipeline with the arguments of its call, or a model with its sampler, not "
        f"{type(first).__name__}" + (f" and {type(second).__name__}" if second is not None else "")
    )


def _of_pipeline(pipe: Any, call: dict[str, Any], device: str, prompt: str) -> Sampling:
    """A pipeline's first transformer, and a sampler that runs the pipeline with it. If there are more transformers they
    are given what the first one is: its policy, or torch.compile."""
    parts = transformers_of(pipe)
    if not parts:
        raise TocaError(f"{type(pipe).__name__} has no transformer")
    if hasattr(pipe, "to"):
        pipe.to(device)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    (first, own), *others = parts.items()
    twins: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
    given = inspect.signature(type(pipe).__call__).parameters

    def sampler(model: Any, steps: int, seed: int, count: int) -> Tensor:
        if model not in twins:
            twins[model] = {name: _like(model, other) for name, other in others}
        nets = {first: model, **twins[model]}
        for name, part in nets.items():
            setattr(pipe, name, part)
        cached = {name: part for name, part in nets.items() if isinstance(part, OptimizedModel)}
        for part in cached.values():
            part.policy = model.policy
        if cached:
            attach(pipe, cached)
        run = {"num_inference_steps": steps, "generator": torch.Generator(device).manual_seed(seed)}
        told = {**_asked(given, call, count, prompt), **call, **run}
        out = pipe(**{k: v for k, v in told.items() if k in given or k in call})
        return _tensor(out)

    return Sampling(own, sampler, peak=1.0 if call.get("output_type", "np") == "np" else 2.0)


def _asked(given: Mapping[str, Any], call: Mapping[str, Any], count: int, prompt: str) -> dict[str, Any]:
    """What a call needs beside steps and seed, for so many samples."""
    asked: dict[str, Any] = {"output_type": "np"}
    if "class_labels" in given:
        asked["class_labels"] = list(range(count))
    elif "prompt_embeds" not in call and "prompt" not in call:
        asked["prompt"] = [prompt] * count
    else:
        asked |= {"num_images_per_prompt": count, "num_videos_per_prompt": count}
    return asked


def _like(net: Any, other: nn.Module) -> Any:
    if isinstance(net, OptimizedModel):
        return OptimizedModel(other, net._session.fresh())
    return torch.compile(other, dynamic=False) if hasattr(net, "_orig_mod") else other


def _tensor(out: Any) -> Tensor:
    """The samples of a pipeline's output: its first field, ``[count, …]``."""
    first = next(iter(out.values())) if isinstance(out, Mapping) else out[0] if isinstance(out, tuple) else out
    if isinstance(first, (list, tuple)):
        return torch.stack([torch.as_tensor(part) for part in first])
    return torch.as_tensor(first)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
