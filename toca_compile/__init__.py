"""toca_compile: token-wise feature caching for any diffusion transformer, as a torch.compile pass."""

from toca_compile.errors import (
    InferenceModeError,
    LoweringError,
    NoSiteError,
    PassError,
    PolicyError,
    TocaError,
    UnsupportedGraphError,
    VerifyError,
    cannot_write,
)

try:
    import torch._dynamo  # noqa: F401  (makes Inductor's cache folder)
except OSError as _error:
    raise cannot_write(_error) from _error

from toca_compile.api import controls, disable_cache, enable_cache, explain, is_optimized, optimize, restore, summary
from toca_compile.model import OptimizedModel
from toca_compile.policies import (
    BlockCache,
    ClusCa,
    Composition,
    DuCa,
    Fora,
    FullCompute,
    TaylorSeer,
    TaylorToCa,
    ToCa,
    load_policy,
    preset,
    save_policy,
)
from toca_compile.quality.evaluation import evaluate
from toca_compile.quality.settings import EvaluationSettings, TuningSettings
from toca_compile.quality.tuning import Target, tune

__all__ = [
    "BlockCache",
    "ClusCa",
    "Composition",
    "DuCa",
    "EvaluationSettings",
    "Fora",
    "FullCompute",
    "InferenceModeError",
    "LoweringError",
    "NoSiteError",
    "OptimizedModel",
    "PassError",
    "PolicyError",
    "Target",
    "TaylorSeer",
    "TaylorToCa",
    "ToCa",
    "TocaError",
    "TuningSettings",
    "UnsupportedGraphError",
    "VerifyError",
    "controls",
    "disable_cache",
    "enable_cache",
    "evaluate",
    "explain",
    "is_optimized",
    "load_policy",
    "optimize",
    "preset",
    "restore",
    "save_policy",
    "summary",
    "tune",
]
