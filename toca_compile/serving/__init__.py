"""Many samplings at once: requests that arrive at any time share calls of one model, each with caches of its own."""
