"""What a family says of GGUF files of its models (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from rave_jax.families.config import VlmConfig

Metadata = Mapping[str, Any]
"""Keys and values of a GGUF file."""

WHERE = "GGUF metadata"
"""How messages name them."""


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file.

    Fields:
        name: in the file.
        heads: of a projection whose rows stand in the order of another RoPE, with the halves of each head interleaved;
            0: its rows are those of a HuggingFace checkpoint.
    """

    name: str
    heads: int = 0


class Split(NamedTuple):
    """How a byte-level tokenizer cuts text before it merges.

    Fields:
        pattern: regex of the pieces; empty: that of GPT-2.
        digits: is every digit a piece of its own?
    """

    pattern: str = ""
    digits: bool = False


class GgufModels(NamedTuple):
    """GGUF files of a family's models.

    Fields:
        architecture: what `general.architecture` says.
        config: (metadata, names of the tensors) to the HF config. It raises ConfigError for what is not computed.
        tensors: the tensor of the file for each key of a HuggingFace checkpoint.
        splits: of byte-level tokenizers, by what `tokenizer.ggml.pre` says.
        sentencepiece: what `tokenizer.ggml.model` says of the tokenizers of SentencePiece.
    """

    architecture: str
    config: Callable[[Metadata, Collection[str]], dict[str, Any]]
    tensors: Callable[[VlmConfig], dict[str, GgufTensor]]
    splits: Mapping[str, Split]
    sentencepiece: str
