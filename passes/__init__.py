"""Graph passes. The source lies in ``passes/``; the import name is ``toca_compile.passes``."""

if __name__ != "toca_compile.passes":
    raise ImportError(f"import this package as toca_compile.passes, not {__name__!r}")
