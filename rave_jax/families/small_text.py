"""Small random text models as whole HF directories: what the text families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.small import SmallModels, SmallSizes

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}{{- message.content -}}
  {%- else -%}{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def small_text_models(family: str, render: Callable[[VlmConfig], dict[str, Any]], **fields: Any) -> SmallModels:
    """How small random models of a text family become whole HF directories.

    Args:
        family: its name.
        render: our config to an HF config.
        fields: of `TextConfig`, what makes the family's decoder differ from others.
    """

    def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
        text = TextConfig(
            vocab_size=vocab_size,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.hidden_size // sizes.num_heads,
            mlp_size=sizes.mlp_size,
            tie_embeddings=False,
            **fields,
        )
        return VlmConfig(text=text, eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]), family=family)

    def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        pad = ids["<|endoftext|>"]
        stated = {"bos_token_id": pad, "pad_token_id": pad}
        return {
            "config.json": render(config) | {"dtype": "float32"} | stated,
            "generation_config.json": {**stated, "eos_token_id": list(config.eos_token_ids), "do_sample": False},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": CHAT_TEMPLATE,
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "additional_special_tokens": list(SPECIAL_TOKENS),
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.text.max_position,
            },
        }

    return SmallModels(SPECIAL_TOKENS, config, files)
