"""Small random models as whole HF directories: what a family adds to `checkpoint/tiny.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rave_jax.families.config import TextConfig, VlmConfig


class SmallSizes(Protocol):
    """Sizes of a small random model (`checkpoint.tiny.Tiny`)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def mlp_size(self) -> int: ...
    @property
    def vision_hidden_size(self) -> int: ...
    @property
    def vision_layers(self) -> int: ...
    @property
    def vision_heads(self) -> int: ...
    @property
    def vision_mlp_size(self) -> int: ...
    @property
    def window_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def merge_size(self) -> int: ...


class SmallModels(NamedTuple):
    """How small random models of a family become whole HF directories.

    Fields:
        special_tokens: of its chat format.
        config: (sizes, rows of the embedding, ids of the special tokens) to the model's config.
        files: (config, ids of the special tokens) to what its JSON files hold, by name.
        leading: a special token that the tokenizer puts in front of every text; empty: none.
    """

    special_tokens: tuple[str, ...]
    config: Callable[[SmallSizes, int, Mapping[str, int]], VlmConfig]
    files: Callable[[VlmConfig, Mapping[str, int]], dict[str, dict[str, Any]]]
    leading: str = ""


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens of `chatml`: padding, and what stands around a message."""


def chatml(image: str = "", video: str = "") -> str:
    """A chat template in the format of ChatML, with what a picture and a video are in it; empty: there are none."""
    branches = "".join(
        f"{{%- {'elif' if n else 'if'} part.type == '{kind}' -%}}{text}\n      "
        for n, (kind, text) in enumerate([pair for pair in (("image", image), ("video", video)) if pair[1]])
    )
    text = "{%- else -%}{{- part.text -}}\n      {%- endif -%}" if branches else "{{- part.text -}}"
    return f"""\
{{%- macro written(content) -%}}
  {{%- if content is string -%}}{{{{- content -}}}}
  {{%- else -%}}
    {{%- for part in content -%}}
      {branches}{text}
    {{%- endfor -%}}
  {{%- endif -%}}
{{%- endmacro -%}}
{{%- for message in messages -%}}
  {{{{- '<|im_start|>' + message.role + '\\n' + written(message.content) + '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""


def small_text(sizes: SmallSizes, vocab_size: int, **other: Any) -> TextConfig:
    """The text decoder of a small model, with what its family states beside sizes."""
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.hidden_size // sizes.num_heads,
        mlp_size=sizes.mlp_size,
        tie_embeddings=False,
        **other,
    )


def small_text_models(
    family: str,
    render: Callable[[VlmConfig], dict[str, Any]],
    decoder: Callable[..., TextConfig] = small_text,
    **other: Any,
) -> SmallModels:
    """Small models of a text family, whose `decoder` takes sizes, rows of the embedding and what the family states
    beside them. Their chat format is ChatML."""

    def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
        ends = (ids["<|im_end|>"], ids["<|endoftext|>"])
        return VlmConfig(decoder(sizes, vocab_size, **other), eos_token_ids=ends, family=family)

    def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        return model_files(render(config), config.eos_token_ids, ids, chatml(), config.text.max_position)

    return SmallModels(CHATML_TOKENS, config, files)


def model_files(
    rendered: Mapping[str, Any], ends: Sequence[int], ids: Mapping[str, int], template: str, longest: int
) -> dict[str, dict[str, Any]]:
    """The JSON files that every small model in the format of ChatML has, by name.

    Args:
        rendered: its HF config.
        ends: ids that end an answer.
        ids: of the special tokens, `CHATML_TOKENS` and those of the family.
        template: its chat template.
        longest: tokens that it is made for.
    """
    pad = ids["<|endoftext|>"]
    stated = {"bos_token_id": pad, "pad_token_id": pad}
    return {
        "config.json": {**rendered, "dtype": "float32", **stated},
        "generation_config.json": {**stated, "eos_token_id": list(ends), "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": template,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(ids),
            "clean_up_tokenization_spaces": False,
            "model_max_length": longest,
        },
    }
