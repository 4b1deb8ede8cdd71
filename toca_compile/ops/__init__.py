"""The ``toca::`` ops: what a rewritten graph does beside the model's own arithmetic. Importing this defines them all:
every file here holds ops, and defines them when it is imported.

Token scores are float32 ``[batch, tokens]``; indices are int64 ``[batch, k]``.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
