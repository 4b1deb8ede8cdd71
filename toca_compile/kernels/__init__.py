"""Kernels in Triton, each imported where it is called: Triton comes with the builds of torch for a GPU."""
