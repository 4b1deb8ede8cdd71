"""toca_compile: token-wise feature caching for any diffusion transformer, as a torch.compile pass.

What is asked for is imported when it is asked for: a process that only runs what was exported (``load``) never sees
Dynamo.
"""

import importlib
from typing import TYPE_CHECKING, Any

from toca_compile.errors import (
    ExportError,
    InferenceModeError,
    LoweringError,
    NoSiteError,
    PassError,
    PolicyError,
    ProcessError,
    TocaError,
    UnsupportedGraphError,
    VerifyError,
    cannot_write,
)

if TYPE_CHECKING:
    from toca_compile.api import (
        controls,
        disable_cache,
        enable_cache,
        explain,
        is_optimized,
        optimize,
        restore,
        summary,
    )
    from toca_compile.exported.load import load
    from toca_compile.exported.loaded import LoadedModel
    from toca_compile.exported.program import ProgramModel, program
    from toca_compile.exported.write import export
    from toca_compile.model import OptimizedModel
    from toca_compile.policies import (
        BlockCache,
        ClusCa,
        Composition,
        DuCa,
        Fora,
        FullCompute,
        MagCache,
        TaylorSeer,
        TaylorToCa,
        ToCa,
        load_policy,
        preset,
        save_policy,
    )
    from toca_compile.quality.calibration import magnitudes
    from toca_compile.quality.evaluation import evaluate
    from toca_compile.quality.planning import plan
    from toca_compile.quality.settings import EvaluationSettings, PlanningSettings, TuningSettings
    from toca_compile.quality.tuning import Target, tune
    from toca_compile.serving.engine import Engine
    from toca_compile.serving.offline import batch
    from toca_compile.serving.requests import Request

# Where each name is defined that stands above for type checkers alone.
_HOMES = {
    "api": "controls disable_cache enable_cache explain is_optimized optimize restore summary",
    "exported.load": "load",
    "exported.loaded": "LoadedModel",
    "exported.program": "ProgramModel program",
    "exported.write": "export",
    "model": "OptimizedModel",
    "policies": "BlockCache ClusCa Composition DuCa Fora FullCompute MagCache TaylorSeer TaylorToCa ToCa load_policy "
    "preset save_policy",
    "quality.calibration": "magnitudes",
    "quality.evaluation": "evaluate",
    "quality.planning": "plan",
    "quality.settings": "EvaluationSettings PlanningSettings TuningSettings",
    "quality.tuning": "Target tune",
    "serving.engine": "Engine",
    "serving.offline": "batch",
    "serving.requests": "Request",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        globals()[name] = getattr(_imported(_HOME_OF[name]), name)
        return globals()[name]
    if not name.startswith("_"):  # a module of the package, or nothing
        try:
            return _imported(name)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _imported(part: str) -> Any:
    try:
        return importlib.import_module(f"{__name__}.{part}")
    except OSError as error:  # Dynamo makes Inductor's cache folder
        raise cannot_write(error) from error


__all__ = [
    "BlockCache",
    "ClusCa",
    "Composition",
    "DuCa",
    "Engine",
    "EvaluationSettings",
    "ExportError",
    "Fora",
    "FullCompute",
    "InferenceModeError",
    "LoadedModel",
    "LoweringError",
    "MagCache",
    "NoSiteError",
    "OptimizedModel",
    "PassError",
    "PlanningSettings",
    "PolicyError",
    "ProcessError",
    "ProgramModel",
    "Request",
    "Target",
    "TaylorSeer",
    "TaylorToCa",
    "ToCa",
    "TocaError",
    "TuningSettings",
    "UnsupportedGraphError",
    "VerifyError",
    "batch",
    "controls",
    "disable_cache",
    "enable_cache",
    "evaluate",
    "explain",
    "export",
    "is_optimized",
    "load",
    "load_policy",
    "magnitudes",
    "optimize",
    "plan",
    "preset",
    "program",
    "restore",
    "save_policy",
    "summary",
    "tune",
]
