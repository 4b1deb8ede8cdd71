"""The file: a zip as ``torch.export`` writes it (``.pt2``), with AOTInductor's code of each entry, the weights, and the
table."""

import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toca_compile.errors import ExportError
from toca_compile.exported.table import About, from_json, to_json
from toca_compile.ir.table import Table

CODE = "data/aotinductor"  # where AOTInductor's loader looks for it
TABLE = "extra/toca_compile.json"
WEIGHTS = "extra/toca_compile.weights"
KNOWN = "extra/toca_compile.known"

# Up to torch 2.12 the loader finds what it is told of the code by the name of the source.
_NAMED_BY_SOURCE = torch.torch_version.TorchVersion(torch.__version__) < "2.13"

Runner = Callable[[list[Tensor]], Sequence[Tensor]]


def write(
    path: str | os.PathLike[str],
    about: About,
    table: Table,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, Mapping[str, bytes]],
    known: Mapping[str, Any] | None = None,
) -> None:
    """Write a file, or nothing: it has another name until it is whole.

    Args:
        files: AOTInductor's, by entry and name.
        known: as of ``LoadedModel``.

    Raises:
        ExportError: it cannot be written.
    """
    from torch.export.pt2_archive import PT2ArchiveWriter  # imports Dynamo, which who loads a file does without

    target = Path(path)
    kept = {WEIGHTS: dict(tensors), KNOWN: dict(known or {})}
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".toca-") as folder:
            whole = Path(folder) / target.name
            with PT2ArchiveWriter(str(whole)) as archive:
                for entry, own in files.items():
                    for file, data in own.items():
                        if not file.endswith(".cpp") or (_NAMED_BY_SOURCE and file.endswith(".wrapper.cpp")):
                            archive.write_bytes(f"{CODE}/{entry}/{file}", data)
                archive.write_string(TABLE, to_json(about, table))
                for name, held in kept.items():
                    saved = io.BytesIO()
                    torch.save(held, saved)
                    archive.write_bytes(name, saved.getvalue())
            whole.replace(target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class Contents:
    """What stands in a file: the arguments of ``LoadedModel``."""

    about: About
    table: Table
    tensors: dict[str, Tensor]
    entries: dict[str, Runner]
    known: dict[str, Any]


def read(path: str | os.PathLike[str]) -> Contents:
    """What stands in a file, checked.

    Raises:
        ExportError: it is none of ours, incomplete, or not for this version of torch or this machine.
    """
    name = os.fspath(path)
    try:
        with zipfile.ZipFile(name) as file:
            names = {entry.partition("/")[2]: entry for entry in file.namelist()}  # behind the archive's own
            if not {TABLE, WEIGHTS, KNOWN} <= names.keys():
                raise ExportError(f"{name} was not written by toca_compile.export")
            about, table = from_json(file.read(names[TABLE]).decode("utf-8"))
            _check(about)
            tensors, known = (
                torch.load(io.BytesIO(file.read(names[part])), weights_only=True) for part in (WEIGHTS, KNOWN)
            )
            for inner, entry in names.items():
                if inner.startswith(CODE):
                    file.read(entry)  # what was damaged is told here, and not by its running
    except ExportError as error:
        raise error if str(error).startswith(name) else ExportError(f"{name} cannot be loaded: {error}") from error
    except OSError as error:
        raise ExportError(f"{name} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, UnicodeDecodeError, RuntimeError) as error:
        raise ExportError(
            f"{name} is no file of toca_compile.export, or not all of it: {str(error).splitlines()[0]}"
        ) from error
    return Contents(about, table, tensors, entries(name, table, about), known)


def entries(path: str | os.PathLike[str], table: Table, about: About) -> dict[str, Runner]:
    """The code in a file, by entry.

    Raises:
        ExportError: it cannot be loaded.
    """
    name = os.fspath(path)
    try:
        return {entry: _runner(name, entry, about.machine["device"]) for entry in table.entries}
    except RuntimeError as error:
        raise ExportError(f"the code in {name} cannot be loaded: {str(error).splitlines()[0]}") from error


def machine(device: torch.device) -> dict[str, str]:
    """What code for a device depends on."""
    found = {"device": str(device)}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"capability": f"{major}.{minor}", "name": torch.cuda.get_device_name(device)}
    elif device.type == "cpu":
        found["capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def _check(about: About) -> None:
    """That the file is for this torch and this machine."""
    ours, theirs = (".".join(version.split(".")[:2]) for version in (torch.__version__, about.torch))
    if ours != theirs:
        raise ExportError(f"it was compiled by torch {about.torch}, and this is {torch.__version__}: export it again")
    device = torch.device(about.machine["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ExportError("it was compiled for CUDA, and there is no such device here")
    here = machine(device)
    if here.get("capability") != about.machine.get("capability"):
        raise ExportError(
            f"it was compiled for {device.type} of capability {about.machine.get('capability')}, and this machine's is "
            f"{here.get('capability')}: export it here"
        )


def _runner(path: str, entry: str, device: str) -> Runner:
    index = torch.device(device).index
    loader = torch._C._aoti.AOTIModelPackageLoader(path, entry, False, 1, -1 if index is None else index)
    run: Runner = loader.boxed_run
    return run
