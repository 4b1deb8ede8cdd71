"""The trained models of this project: where they lie, and how diffusers reads them."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from toca_compile.errors import TocaError


def folder(name: str) -> Path:
    """The folder of a trained model that travels with the package; in a checkout, that in ``examples/``.

    Raises:
        TocaError: there is none.
    """
    here = Path(__file__).resolve()
    for parent in (here.parent / "models", here.parents[2] / "examples"):
        if (parent / name / "config.json").exists():
            return parent / name
    raise TocaError(f"the demo's model (examples/{name} in the repository) is not there: give its path by --model")


def kind(path: Path) -> str:
    """The class of the model in a folder, as its configuration names it.

    Raises:
        TocaError: it does not.
    """
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TocaError(f"{path} has neither model_index.json nor a config.json of a diffusers model") from error


def load(path: Path, model: str, scheduler: str) -> tuple[Any, Any]:
    """Model (float32, eval) and scheduler of a folder, by the names of their classes.

    Raises:
        TocaError: it holds another model, or none.
    """
    if (found := kind(path)) != model:
        raise TocaError(
            f"{path} is a {found} alone, and how to sample it is not known: give its pipeline's folder, or "
            "package.module:factory"
        )
    diffusers = importlib.import_module("diffusers")
    try:
        net = getattr(diffusers, model).from_pretrained(path, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        return net.eval(), getattr(diffusers, scheduler).from_pretrained(path / "scheduler")
    except (OSError, ValueError) as error:
        raise TocaError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error


def begun(model: Any, scheduler: Any) -> Any:
    """The timesteps of a sampling, of which an optimised model is told as a pipeline tells it."""
    return model.begin(scheduler) if hasattr(model, "begin") else scheduler.timesteps
