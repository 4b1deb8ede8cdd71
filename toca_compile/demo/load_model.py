"""A model and an example call of it, from a folder of diffusers or from Python, for commands that look into models."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.errors import TocaError

Example = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one call

_WORDS, _TOKENS, _SIDE, _FRAMES = 5, 16, 16, 2  # of an example
_DEPTHS = ("num_layers", "num_single_layers", "num_refiner_layers", "n_layers")  # what tells how deep a model is


def load(name: str) -> tuple[nn.Module, Example]:
    """The model that ``name`` says, in eval mode, and an example call.

    Args:
        name: a folder with the ``config.json`` of a diffusers transformer (or with ``transformer/`` in it), or
            ``package.module:factory``. A factory takes no arguments and returns the model, alone or with its example
            inputs: a tuple of them, or a dictionary by name.

    Raises:
        TocaError: there is no such model, or no example can be made for it.
    """
    if Path(name).is_dir():
        model, example = _of_folder(Path(name)), None
    elif ":" in name:
        model, example = _of_factory(name)
    else:
        raise TocaError(f"{name} is neither a folder with a config.json nor package.module:factory")
    return model.eval(), example or _example(model)


# -- from Python ------------------------------------------------------------------------------------------------------


def imported(name: str) -> Any:
    """What the function that ``package.module:factory`` names returns.

    Raises:
        TocaError: there is none, or it failed.
    """
    path, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a command does not look into the folder that it is called from
    try:
        return getattr(importlib.import_module(path), attribute)()
    except (ImportError, ValueError) as error:
        raise TocaError(f"{path} cannot be imported: {error}") from error
    except AttributeError as error:
        raise TocaError(f"{name}: {error}") from error
    except Exception as error:
        raise TocaError(f"{name} failed: {type(error).__name__}: {error}") from error


def _of_factory(name: str) -> tuple[nn.Module, Example | None]:
    made = imported(name)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TocaError(f"{name} must return a torch.nn.Module, or one with its inputs, not {type(model).__name__}")
    if inputs is None:
        return model, None
    if isinstance(inputs, Mapping):
        return model, ((), dict(inputs))
    return model, (tuple(inputs) if isinstance(inputs, Sequence) else (inputs,), {})


# -- from a folder ----------------------------------------------------------------------------------------------------


def _of_folder(path: Path) -> nn.Module:
    path = path if (path / "config.json").exists() else path / "transformer"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TocaError(f"{path} has no config.json with the _class_name of a diffusers model") from error
    cls: Any = getattr(importlib.import_module("diffusers"), str(kind), None)
    if cls is None:
        raise TocaError(f"the installed diffusers has no {kind}")
    try:
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            model: nn.Module = cls.from_pretrained(path, low_cpu_mem_usage=False)
            return model
        # Without weights what is found in two blocks is found in all.
        defaults = {n: p.default for n, p in inspect.signature(cls.__init__).parameters.items()}
        depths = {n: v for n, v in (defaults | config).items() if n in _DEPTHS and isinstance(v, int)}
        config |= {n: min(v, 2) for n, v in depths.items()}
        made: nn.Module = cls.from_config(config)
        return made
    except Exception as error:
        raise TocaError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error


# -- example inputs ---------------------------------------------------------------------------------------------------


def _example(model: nn.Module) -> Example:
    """One sample, small, for a model that names its inputs as diffusers does."""
    config: Mapping[str, Any] = getattr(model, "config", None) or {}
    parameters = inspect.signature(model.forward).parameters
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    asked = {n for n, p in named.items() if p.default is p.empty}
    failure = ""
    for hidden in _hidden_states(config, parameters):
        inputs = {name: make(config) for name, make in _INPUTS.items() if name in parameters}
        inputs = {n: v for n, v in inputs.items() if v is not None} | {"hidden_states": hidden}
        if asked - set(inputs):
            failure = f"it does not know {', '.join(sorted(asked - set(inputs)))}"
            break
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            failure = failure or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            return (), inputs
    raise TocaError(
        f"no example inputs could be made for {type(model).__name__} ({failure}): write a factory that returns the "
        "model with its inputs, and give package.module:factory"
    )


def _hidden_states(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> Iterator[Tensor]:
    """Latents in the layouts that there are: packed tokens, a picture, a video with channels or frames first."""
    channels = int(config.get("in_channels") or 4)
    if "img_ids" in parameters:
        yield torch.randn(1, _TOKENS, channels)
        return
    size = config.get("sample_size")
    side = min(size, _SIDE) if isinstance(size, int) else _SIDE
    yield torch.randn(1, channels, side, side)
    yield torch.randn(1, channels, _FRAMES, side, side)
    yield torch.randn(1, _FRAMES, channels, side, side)


def _width(*names: str) -> Callable[[Mapping[str, Any]], int]:
    """The first of some settings that is given."""
    return lambda config: next((v for v in map(config.get, names) if isinstance(v, int)), 8)


_text_width = _width("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim")
_pooled_width = _width("pooled_projection_dim")

# What an input is by its name; None: it is left out.
_INPUTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "timestep": lambda config: torch.full((1,), 500.0),
    "class_labels": lambda config: torch.zeros(1, dtype=torch.long),
    "encoder_hidden_states": lambda config: torch.randn(1, _WORDS, _text_width(config)),
    "encoder_attention_mask": lambda config: torch.ones(1, _WORDS),
    "pooled_projections": lambda config: torch.randn(1, _pooled_width(config)),
    "guidance": lambda config: torch.ones(1) if config.get("guidance_embeds") else None,
    "img_ids": lambda config: torch.zeros(_TOKENS, 3),
    "txt_ids": lambda config: torch.zeros(_WORDS, 3),
    "added_cond_kwargs": lambda config: {"resolution": None, "aspect_ratio": None},
}
