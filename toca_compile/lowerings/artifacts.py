"""Compiled artifacts on disk, so that the next process neither traces nor compiles a variant again.

Inductor's own cache spares the next process the C++ compiler, but each graph is still traced and hashed by AOTAutograd
first. Here the artifact as a whole is found by what it was made of: the graph's text, its inputs, Inductor's settings,
torch's key, this package's kernels and the machine.

A file holds pickles and machine code. It lies in Inductor's own cache folder, which holds the same, under the name of
its key and of its content's digest; one that somebody else could have written is not read.
"""

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.codecache import torch_key
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.standalone_compile import CompiledArtifact

log = logging.getLogger(__name__)

Artifact = Callable[..., Sequence[Any]]
LIMIT = 1 << 30
"""Bytes of all files together; the ones that were not used for longest go."""


def enabled() -> bool:
    """Whether artifacts are kept: as long as Inductor keeps its own."""
    return not config.force_disable_caches and config.fx_graph_cache


def folder() -> Path:
    """Where they lie; ``TORCHINDUCTOR_CACHE_DIR`` moves it."""
    return Path(cache_dir()) / "toca"


def key_of(*made_of: Any, device: torch.device) -> str:
    """The name of an artifact: a digest of what it is made of."""
    parts = (*map(repr, made_of), torch.__version__, torch_key().hex(), sources(), _machine(str(device)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(key: str) -> Artifact | None:
    """The artifact of a key; None where there is none that can be read. One that is damaged is removed."""
    for path in _files(folder(), key):
        if not _is_ours(path):
            log.warning("%s is not read: it or its folder can be written by others", path)
            continue
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != path.name.split(".")[1]:
                raise ValueError("its content is not what was written")
            artifact = CompiledArtifact.load(path=str(path))
            os.utime(path)  # used just now
        except Exception as error:  # whatever a file that was cut off makes of a loader
            log.info("%s is removed: %s", path, error)
            path.unlink(missing_ok=True)
            continue
        return artifact
    return None


def save(key: str, artifact: Any) -> None:
    """Keep an artifact. That it cannot be kept, or the disk be written, is no error: it is compiled again."""
    target = folder()
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(_files(target, key)):
            return
        # Under another name until it is whole: another process may read, or write the same.
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=target))) / "artifact"
        try:
            artifact.save(path=str(file))
        except OSError:
            raise
        except Exception as error:  # torch says in several ways that there is nothing to save
            log.info("an artifact cannot be kept: %s", error)
            return
        file.chmod(0o600)
        file.replace(target / f"{key}.{hashlib.sha256(file.read_bytes()).hexdigest()}")
        _evict(target)


def _files(where: Path, key: str = "") -> Iterator[Path]:
    yield from (path for path in where.glob(f"{key}*.*") if path.is_file())


def _evict(where: Path) -> None:
    """Remove the oldest files beyond the limit."""
    known = []
    for path in _files(where):
        with contextlib.suppress(OSError):  # another process removed it
            told = path.stat()
            known.append((told.st_mtime, told.st_size, path))
    total = 0
    for _, size, path in sorted(known, reverse=True):
        total += size
        if total > LIMIT:
            path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether nobody else could have written a file."""
    if not hasattr(os, "getuid"):
        return True  # where files have no owner in this sense, Inductor's own cache is not held to more
    others = stat.S_IWGRP | stat.S_IWOTH
    return all(told.st_uid == os.getuid() and not told.st_mode & others for told in (path.stat(), path.parent.stat()))


@cache
def sources() -> str:
    """A digest of what runs inside compiled code: this package's kernels and how it lowers."""
    package = Path(__file__).resolve().parent.parent
    files = sorted(file for part in ("ops", "kernels", "lowerings") for file in (package / part).glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


@cache
def _machine(device: str) -> str:
    """What code was compiled for."""
    if torch.device(device).type != "cuda":
        return f"{device} {pick_vec_isa()} {torch.get_num_threads()}"
    told = torch.cuda.get_device_properties(device)
    return f"{device} {told.name} {told.major}.{told.minor} {told.multi_processor_count}"
