"""Attention: token codes become masks, mechanisms change it through hooks, and `attend` runs one kernel.

One line per mechanism below makes it known to configs.
"""

from rave_jax.attention.arrow import Arrow
from rave_jax.attention.attend import (
    AttentionOutput,
    attend,
    combine,
    mask_codes,
    positions,
    remember,
    router_of,
    summarise,
)
from rave_jax.attention.avar import Avar
from rave_jax.attention.base import (
    AttentionDims,
    Candidates,
    Channels,
    Features,
    KeyFactor,
    Keys,
    Mechanism,
    OtherQuery,
    Owned,
    Parts,
    Score,
    Views,
)
from rave_jax.attention.biformer import BiFormer
from rave_jax.attention.cache import Cache, CacheType, LayerKeys, RegionMemory, RegionReach
from rave_jax.attention.cca import Cca
from rave_jax.attention.checks import check_kernels, check_owners, name_of
from rave_jax.attention.choices import ChoiceSums
from rave_jax.attention.context import ContextSight
from rave_jax.attention.cost import LayerReading, PicturesBefore
from rave_jax.attention.croc import Croc
from rave_jax.attention.declared import LayeredConfig, Layers, MechanismConfig, NamedLayers
from rave_jax.attention.decomposed import Decomposed
from rave_jax.attention.dyvte import Dyvte
from rave_jax.attention.gaze import Gaze, TopKSchedule
from rave_jax.attention.gift import Gift
from rave_jax.attention.kv_cache import KvCache, empty_cache
from rave_jax.attention.log_n import LogN
from rave_jax.attention.masks import block_diagonal_codes, cached_codes, causal_codes
from rave_jax.attention.mma import Mma
from rave_jax.attention.moba import Moba
from rave_jax.attention.moh import Moh
from rave_jax.attention.paint import Paint
from rave_jax.attention.pine import Pine
from rave_jax.attention.plan import LayerRunPlan, build_mechanisms, plan_layer_runs
from rave_jax.attention.prompted import Prompted, PromptPass, PromptSizes
from rave_jax.attention.pruning import Pruning
from rave_jax.attention.rave import Rave
from rave_jax.attention.region_cache import check_decoding
from rave_jax.attention.region_entries import RegionCache, empty_region_cache
from rave_jax.attention.sads import Sads
from rave_jax.attention.scores import pick
from rave_jax.attention.short_keys import ShortKeys, with_short_keys
from rave_jax.attention.sliding_window import SlidingWindow
from rave_jax.attention.sparsifiner import Sparsifiner
from rave_jax.attention.states import StoredStates
from rave_jax.attention.statistics import Statistics, WantedStatistics
from rave_jax.attention.steer import Steer
from rave_jax.attention.superlinear import Superlinear
from rave_jax.attention.text_positions import TextPositions
from rave_jax.attention.var import Var
from rave_jax.attention.vhr import Vhr
from rave_jax.attention.visual_bias import VisualBias
from rave_jax.attention.zero_tuning import ZeroTuning
from rave_jax.kernels.attention import ScoreFunction, Term, Tile

__all__ = [
    "Arrow",
    "AttentionDims",
    "AttentionOutput",
    "Avar",
    "BiFormer",
    "Cache",
    "CacheType",
    "Candidates",
    "Cca",
    "Channels",
    "ChoiceSums",
    "ContextSight",
    "Croc",
    "Decomposed",
    "Dyvte",
    "Features",
    "Gaze",
    "Gift",
    "KeyFactor",
    "Keys",
    "KvCache",
    "LayerKeys",
    "LayerReading",
    "LayerRunPlan",
    "LayeredConfig",
    "Layers",
    "LogN",
    "Mechanism",
    "MechanismConfig",
    "Mma",
    "Moba",
    "Moh",
    "NamedLayers",
    "OtherQuery",
    "Owned",
    "Paint",
    "Parts",
    "PicturesBefore",
    "Pine",
    "PromptPass",
    "PromptSizes",
    "Prompted",
    "Pruning",
    "Rave",
    "RegionCache",
    "RegionMemory",
    "RegionReach",
    "Sads",
    "Score",
    "ScoreFunction",
    "ShortKeys",
    "SlidingWindow",
    "Sparsifiner",
    "Statistics",
    "Steer",
    "StoredStates",
    "Superlinear",
    "Term",
    "TextPositions",
    "Tile",
    "TopKSchedule",
    "Var",
    "Vhr",
    "Views",
    "VisualBias",
    "WantedStatistics",
    "ZeroTuning",
    "attend",
    "block_diagonal_codes",
    "build_mechanisms",
    "cached_codes",
    "causal_codes",
    "check_decoding",
    "check_kernels",
    "check_owners",
    "combine",
    "empty_cache",
    "empty_region_cache",
    "mask_codes",
    "name_of",
    "pick",
    "plan_layer_runs",
    "positions",
    "remember",
    "router_of",
    "summarise",
    "with_short_keys",
]
