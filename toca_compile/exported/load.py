"""``load``: a model of a file."""

from os import PathLike

import torch

from toca_compile.exported import archive
from toca_compile.exported.loaded import LoadedModel
from toca_compile.exported.whole import CompiledSteps, WholeModel


def load(path: str | PathLike[str]) -> LoadedModel:
    """A model that ``toca_compile.export`` wrote. It holds machine code: load only files that you trust.

    Args:
        path: of the file. It is not needed any more when the model is loaded.

    Returns:
        A callable with the arguments of the exported model, of the shapes that it was exported for.

    Raises:
        ExportError: the file is none of ours, incomplete, or made for another version or machine; the message says
            which.
    """
    own = archive.read(path)
    about, table = own.about, own.table
    if table.whole is None:
        return LoadedModel(about, table, own.tensors, own.entries, own.known)
    steps = CompiledSteps(table, own.entries[table.whole.entry], own.tensors, torch.device(about.machine["device"]))
    return WholeModel(about, table, own.tensors, steps, table.whole.inputs)
