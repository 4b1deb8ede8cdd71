"""Proofs: why a branch may be computed on some of its rows, and a range of blocks be skipped."""
