"""Literal eager versions of what the published ToCa code does to each of its four models.

Full maps, argsort, dictionaries of caches; step kinds decided once a step, before the model runs. They share nothing with
the compiler, so that agreement means something.
"""
