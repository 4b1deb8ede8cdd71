"""What lives while a model runs: which step it is, and the caches."""
