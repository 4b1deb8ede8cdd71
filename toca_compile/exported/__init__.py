"""A model with its caches as a file that runs without its code, without Dynamo and without a compiler.

``write.export`` makes the file: each variant that the plan needs as machine code (or whole steps as one graph), the
weights once, and a table that says which step calls what with which buffers. ``load.load`` reads it. The table is plain
data (``table.py``).
"""
