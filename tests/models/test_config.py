from __future__ import annotations

import pytest

from rave_jax.attention import SlidingWindow
from rave_jax.config import ConfigError, dumps, loads
from rave_jax.models.config import Lora, ModelOptions, TextConfig, VisionConfig, VlmConfig


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
        (lambda: VlmConfig(text=TextConfig(hidden_size=32)), "vision.out_size"),
        (lambda: Lora(rank=0), "lora.rank"),
        (lambda: Lora(targets=()), "lora.targets"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(make, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is "):
        make()


def test_configs_survive_json() -> None:
    options = ModelOptions(mechanisms=(SlidingWindow(5, layers=(1, 2)),), lora=Lora())
    assert loads(ModelOptions, dumps(options)) == options
    assert loads(VlmConfig, dumps(VlmConfig())) == VlmConfig()


def test_a_window_holds_whole_merge_units() -> None:
    assert VisionConfig().window_patches == 64
    # 3 patches a side hold one merge unit of 2 x 2, not 9 patches.
    assert VisionConfig(window_size=42).window_patches == 4
