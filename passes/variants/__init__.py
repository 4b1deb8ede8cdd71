"""A segment and what its sites do, to a graph."""
