"""The errors that leave this package. Each names the cause and the remedy."""

from collections.abc import Sequence


class TocaError(Exception):
    """Base of every error raised by toca_compile."""


class PolicyError(TocaError, ValueError):
    """A policy whose numbers cannot hold, or that a model cannot honour."""


class NoSiteError(TocaError):
    """The model has no residual branch on a token axis: nothing could be cached. ``unknown``: ops without a rule."""

    unknown: tuple[str, ...] = ()


class InferenceModeError(TocaError, RuntimeError):
    """The model is in training mode, or gradients are enabled: a cached output has no history to differentiate."""


class UnsupportedGraphError(TocaError):
    """The traced graph holds something that cannot be compiled at all, such as a graph without tensors."""


class UnknownSizeError(UnsupportedGraphError):
    """The traced graph holds values whose sizes only other values tell, where nothing can hold these together."""


class LoweringError(TocaError, RuntimeError):
    """The machine cannot compile: no C++ compiler, no room, or no place for Inductor's files."""


class ExportError(TocaError, ValueError):
    """A model or policy that a file cannot hold, a file that is none of ours or not for this machine, or a call that
    the model in it was not exported for."""


class ProcessError(TocaError, RuntimeError):
    """Processes that share a model do not do the same, or one of them is gone."""


class PassError(TocaError):
    """A compiler pass failed; the message names it and the passes that ran before."""


class VerifyError(TocaError):
    """A graph between two passes is not legal: the pass named in the message broke it."""


class RuleError(TocaError):
    """A rule was registered twice, or describes an op in a way that cannot be."""


GRAD_ENABLED = (
    "gradients are enabled, and a cached output has none: call the model under torch.no_grad() or "
    "torch.inference_mode()"
)
NO_SITE = (
    "has no residual branch on an axis of tokens (which an attention's queries run over, or a convolution, a running "
    "sum or a layer mixes), so there is nothing to cache. toca_compile is for diffusion transformers; is this the "
    "right module?"
)


def no_rules(ops: Sequence[str]) -> str:
    """What to say of ops of which nothing is known; nothing where there are none."""
    if not ops:
        return ""
    named = ", ".join(ops[:4]) + (f" and {len(ops) - 4} more" if len(ops) > 4 else "")
    return f"Nothing is known of what {named} do to the tokens: register a rule for each (toca_compile.rules)"


def cannot_write(error: OSError) -> LoweringError:
    """The error for a machine on which Inductor's files cannot be written."""
    return LoweringError(
        f"Inductor could not write its files ({error}): make room, or set TORCHINDUCTOR_CACHE_DIR (and TMPDIR) to a "
        "folder that can be written, or take lowering='eager'"
    )
