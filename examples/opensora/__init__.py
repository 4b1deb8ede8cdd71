"""OpenSora 1.2's video transformer and sampler, written from the architecture's description: a user's own model."""
