"""The ``toca::`` ops: what a rewritten graph does beside the model's own arithmetic. Importing this defines them all.

Token scores are float32 ``[batch, tokens]``; indices are int64 ``[batch, k]``.
"""

from toca_compile.ops import dynamics, rows, scores, selection, series

__all__ = ["dynamics", "rows", "scores", "selection", "series"]
