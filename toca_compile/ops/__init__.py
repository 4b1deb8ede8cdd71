"""The ``toca::`` ops: what a rewritten graph does beside the model's own arithmetic. Importing this defines them all.

Token scores are float32 ``[batch, tokens]``; indices are int64 ``[batch, k]``.
"""

from toca_compile.ops import causal, dynamics, flex, rows, scores, selection, series

__all__ = ["causal", "dynamics", "flex", "rows", "scores", "selection", "series"]
