"""What the demo samples with: a small trained DiT, and a classifier that judges it."""
