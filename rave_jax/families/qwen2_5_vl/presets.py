"""Configs by name: the released Qwen2.5-VL sizes whose config.json we have read, and tiny ones.

3B and 7B repeat the `config.json` of Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct; a test compares
them with the files. The file of 72B was not at hand: its sizes are those of its report and serve to plan with. 32B is
left out. `family_for(config).parse` reads the files of all.
"""

from __future__ import annotations

import dataclasses

from rave_jax.families.config import TextConfig, VlmConfig, tower_of
from rave_jax.families.qwen2_5_vl.config import MODEL_TYPE, VisionConfig
from rave_jax.families.shared.grids.hf import EOS_ID, MARKER_IDS
from rave_jax.families.shared.grids.tiny import mrope_thirds, tiny_model


def _tower(out_size: int) -> VisionConfig:
    return VisionConfig(
        depth=32,
        hidden_size=1280,
        num_heads=16,
        mlp_size=3420,
        full_attention_blocks=(7, 15, 23, 31),
        out_size=out_size,
    )


def _released(text: TextConfig, out_size: int) -> VlmConfig:
    return VlmConfig(
        text=text,
        vision=_tower(out_size),
        **MARKER_IDS,
        eos_token_ids=(EOS_ID,),
        tokens_per_second=2.0,
        family=MODEL_TYPE,
    )


def qwen2_5_vl_3b() -> VlmConfig:
    """Qwen2.5-VL-3B-Instruct."""
    text = TextConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        mlp_size=11008,
        mrope_section=(16, 24, 24),
        tie_embeddings=True,
        max_position=8192,
    )
    return _released(text, 2048)


def qwen2_5_vl_7b() -> VlmConfig:
    """Qwen2.5-VL-7B-Instruct."""
    text = TextConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_size=18944,
        mrope_section=(16, 24, 24),
        tie_embeddings=False,
        max_position=128000,
    )
    return _released(text, 3584)


def qwen2_5_vl_72b() -> VlmConfig:
    """Qwen2.5-VL-72B-Instruct, by its published sizes; its config.json was not at hand."""
    model = qwen2_5_vl_7b()
    text = dataclasses.replace(
        model.text, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_size=29568
    )
    tower = dataclasses.replace(tower_of(model, VisionConfig), out_size=8192, mlp_size=3456)
    return dataclasses.replace(model, text=text, vision=tower)


def tiny(
    *,
    vocab_size: int = 512,
    width: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    tie_embeddings: bool = True,
    vision_depth: int = 2,
    full_attention_blocks: tuple[int, ...] = (1,),
) -> VlmConfig:
    """A model of the same architecture that runs in milliseconds.

    Placeholder and marker ids are the last five of the vocabulary. Windows are 2 x 2 merge units, so that small images
    have several.
    """
    half = width // num_heads // 2
    vision = VisionConfig(
        depth=vision_depth,
        hidden_size=16,
        num_heads=2,
        mlp_size=24,
        patch_size=4,
        window_size=16,
        full_attention_blocks=full_attention_blocks,
        out_size=width,
    )
    return tiny_model(
        MODEL_TYPE,
        vision,
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width // num_heads,
        mrope_section=mrope_thirds(half, (half + 1) // 3),
        tie_embeddings=tie_embeddings,
    )


RELEASED = {
    "Qwen2.5-VL-3B-Instruct": qwen2_5_vl_3b,
    "Qwen2.5-VL-7B-Instruct": qwen2_5_vl_7b,
    "Qwen2.5-VL-72B-Instruct": qwen2_5_vl_72b,
}
"""Folder name of a released checkpoint -> its shapes."""
