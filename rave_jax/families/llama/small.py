"""What makes a small random model of this family a whole HF directory."""

from __future__ import annotations

from rave_jax.families.llama.config import MODEL_TYPE, render
from rave_jax.families.small_text import small_text_models

SMALL = small_text_models(MODEL_TYPE, render, qkv_bias=False, rope_theta=1e4)
