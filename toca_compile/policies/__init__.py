"""Caching policies, one a file: frozen dataclasses of host data. They know sites, never tensors."""

from toca_compile.policies.full import FullCompute
from toca_compile.policies.presets import PRESETS, preset
from toca_compile.policies.storage import load_policy, save_policy
from toca_compile.policies.taylor import TaylorSeer
from toca_compile.policies.toca import Fora, ToCa

__all__ = ["PRESETS", "Fora", "FullCompute", "TaylorSeer", "ToCa", "load_policy", "preset", "save_policy"]
