"""The types that the passes exchange: axes, sites, blocks, plans, and the ``toca::`` ops."""
