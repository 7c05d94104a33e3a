from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from rave_jax.attention import Gaze, Rave, SlidingWindow
from rave_jax.config import ConfigError, dumps, loads
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl.config import VisionConfig
from rave_jax.layout import AdaptiveRegions, ContextTokens, FixedRegions
from rave_jax.models.config import Lora, ModelOptions


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TextConfig(num_heads=5, num_kv_heads=2), "num_heads"),
        (lambda: TextConfig(head_dim=7), "head_dim"),
        (lambda: TextConfig(head_dim=16, mrope_section=(4, 4, 4)), "mrope_section"),
        (lambda: TextConfig(sliding_window=0), "sliding_window"),
        (lambda: VisionConfig(hidden_size=30, num_heads=4), "hidden_size"),
        (lambda: VisionConfig(window_size=27), "window_size"),
        (lambda: VisionConfig(full_attention_blocks=(2,)), "full_attention_blocks"),
        (lambda: VisionConfig(in_channels=1), "pixel_mean"),
        (lambda: VlmConfig(text=TextConfig(hidden_size=32), vision=VisionConfig(), family="f"), "vision.out_size"),
        (lambda: Lora(rank=0), "lora.rank"),
        (lambda: Lora(targets=()), "lora.targets"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(make, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is "):
        make()


BEYOND_ANY_MODEL = (-1, 0, 10**9, 10**12, 10**40)
NO_INTEGERS = ("4", 2.0, True, None, [4], math.nan)
SIDES = ("patch_size", "temporal_patch_size", "merge_size")
SIZES = {
    TextConfig: ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size"),
    VisionConfig: ("depth", "hidden_size", "num_heads", "mlp_size", "out_size", "in_channels", "window_size", *SIDES),
    Lora: ("rank",),
    Rave: ("rank",),
    ContextTokens: ("count",),
    Gaze: ("max_regions",),
    FixedRegions: ("height", "width", "frames"),
    AdaptiveRegions: ("rows", "cols", "frames", "tokens"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SIZES.items() for name in names])
def test_a_size_that_no_model_has_is_refused_before_it_takes_memory(kind: Any, name: str) -> None:
    for value in (*BEYOND_ANY_MODEL, *NO_INTEGERS):
        with pytest.raises(ConfigError, match=rf"^(lora\.)?{name} is ") as error:
            kind(**{name: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (TextConfig, "rms_norm_eps", (-1e-6, math.nan, math.inf, "1e-6", None)),
        (VisionConfig, "rms_norm_eps", (-1e-6, math.nan)),
        (TextConfig, "rope_theta", (0, -1e4, math.nan, 1e300, 1e-300, "1e6")),
        (VisionConfig, "rope_theta", (0, math.inf)),
        (TextConfig, "max_position", (0, 2**31)),
        (TextConfig, "sliding_window", (0, 2**31, 4.0)),
        (TextConfig, "window_from", (-1, 2**40)),
        (TextConfig, "mrope_section", ((-8, 8, 8), (2.0, 3, 3), [2, 3, 3], (8, "0"))),
        (TextConfig, "tie_embeddings", (None, 1, "yes")),
        (VisionConfig, "pixel_std", ((0.0, 1.0, 1.0), (math.nan, 1.0, 1.0), (1.0,))),
        (partial(VlmConfig, family="f"), "image_token_id", (-2, 2**31, 1.0, None)),
        (partial(VlmConfig, family="f"), "eos_token_ids", ((-1,), (2**40,), 5, [5])),
        (partial(VlmConfig, family="f"), "tokens_per_second", (0, -1, math.nan, "2")),
        (Lora, "alpha", (math.nan, 1e300, "16")),
        (Lora, "targets", (("decoder.mlp.up", 3), "decoder.mlp.up", None)),
        (ModelOptions, "mechanisms", ("rave", (Rave,), [Rave()], None)),
        (ModelOptions, "param_dtype", ("float64", None, 32)),
        (ModelOptions, "lora", (8, {"rank": 8})),
    ],
)
def test_a_number_that_cannot_be_computed_with_is_refused_by_name(kind: Any, name: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"^(lora\.)?{name} is "):
            kind(**{name: value})


def test_configs_survive_json() -> None:
    options = ModelOptions(mechanisms=(SlidingWindow(5, layers=(1, 2)),), lora=Lora())
    assert loads(ModelOptions, dumps(options)) == options


def test_a_window_holds_whole_merge_units() -> None:
    assert VisionConfig().window_patches == 64
    # 3 patches a side hold one merge unit of 2 x 2, not 9 patches.
    assert VisionConfig(window_size=42).window_patches == 4
