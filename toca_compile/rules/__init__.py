"""Axis rules of ATen ops, one file per behaviour. A new op is one entry here and nothing elsewhere.

``python -m toca_compile.rules [MODEL]`` lists them, or which of them a model uses and which it lacks.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(m.name for m in iter_modules(__path__) if m.name not in ("registry", "__main__")):
    import_module(f"{__name__}.{_module}")
