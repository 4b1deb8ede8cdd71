"""Caching policies, one a file: frozen dataclasses of host data. They know sites, never tensors."""

from toca_compile.ir.gates import FilteredInput, FirstBlocks, FirstInput, FirstOutput, LastBlocks, Rate
from toca_compile.ir.registry import import_files, register
from toca_compile.ir.selectors import Selector
from toca_compile.policies.anchors import Anchors, Chebyshev, Dmd, Foca, Given, Hermite, Mixed, Polynomial, Taylor
from toca_compile.policies.block_cache import BlockCache
from toca_compile.policies.clusca import ClusCa, Clusters
from toca_compile.policies.composition import (
    Composition,
    Compute,
    Forecast,
    Partial,
    Queries,
    Reuse,
    Rule,
    Share,
    SkipBlocks,
)
from toca_compile.policies.dicache import Along, DiCache
from toca_compile.policies.easycache import EasyCache
from toca_compile.policies.freqca import Bands, FreqCa
from toca_compile.policies.full import FullCompute
from toca_compile.policies.hyca import ByChannel
from toca_compile.policies.levels import LEVELS, Level
from toca_compile.policies.magcache import MagCache, Magnitudes
from toca_compile.policies.meancache import MeanCache, MeanVelocity
from toca_compile.policies.peers import from_dict
from toca_compile.policies.planned import Planned
from toca_compile.policies.presets import PRESETS, preset, ready_made
from toca_compile.policies.seacache import SeaCache
from toca_compile.policies.speca import SpeCa
from toca_compile.policies.storage import load_policy, save_policy
from toca_compile.policies.taylor import TaylorSeer, TaylorToCa
from toca_compile.policies.teacache import TeaCache
from toca_compile.policies.toca import DuCa, Fora, ToCa
from toca_compile.policies.when import Adaptive, EndAligned, Every, IntervalFunction, Listed, Periodic, Spread

import_files(__name__, __path__)

__all__ = [
    "LEVELS",
    "PRESETS",
    "Adaptive",
    "Along",
    "Anchors",
    "Bands",
    "BlockCache",
    "ByChannel",
    "Chebyshev",
    "ClusCa",
    "Clusters",
    "Composition",
    "Compute",
    "DiCache",
    "Dmd",
    "DuCa",
    "EasyCache",
    "EndAligned",
    "Every",
    "FilteredInput",
    "FirstBlocks",
    "FirstInput",
    "FirstOutput",
    "Foca",
    "Fora",
    "Forecast",
    "FreqCa",
    "FullCompute",
    "Given",
    "Hermite",
    "IntervalFunction",
    "LastBlocks",
    "Level",
    "Listed",
    "MagCache",
    "Magnitudes",
    "MeanCache",
    "MeanVelocity",
    "Mixed",
    "Partial",
    "Periodic",
    "Planned",
    "Polynomial",
    "Queries",
    "Rate",
    "Reuse",
    "Rule",
    "SeaCache",
    "Selector",
    "Share",
    "SkipBlocks",
    "SpeCa",
    "Spread",
    "Taylor",
    "TaylorSeer",
    "TaylorToCa",
    "TeaCache",
    "ToCa",
    "from_dict",
    "load_policy",
    "preset",
    "ready_made",
    "register",
    "save_policy",
]
