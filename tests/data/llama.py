"""The tokenizer of Llama 2 from its SentencePiece file."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rave_jax.checkpoint.sentencepiece import sentencepiece_tokenizer


def llama_tokenizer(file: Path, legacy: bool) -> PreTrainedTokenizerFast:
    """`legacy` puts a space before every stretch of text between special tokens, else before the first alone."""
    backend = sentencepiece_tokenizer(file, legacy)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
