"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json.

A file holds the vocabulary and the merges of the tokenizer that the model was trained with. How text is cut before the
merges it only names (`tokenizer.ggml.pre`); the rules of the names are those of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from rave_jax.checkpoint.sentencepiece import SPACE, merges_of
from rave_jax.config import ConfigError
from rave_jax.families.gguf import WHERE, GgufModels, Metadata, Split
from rave_jax.families.hf import flag, integer, need, only

CONTROL, USER_DEFINED = 3, 4
NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
BYTES = "gpt2"
"""What `tokenizer.ggml.model` says of a byte-level tokenizer."""


def tokenizer_files(metadata: Metadata, gguf: GgufModels) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and what tokenizer_config.json says of it.

    Args:
        metadata: of the file.
        gguf: what the family says of such files.

    Raises:
        ConfigError: metadata are missing, or are of a tokenizer that is not known.
    """
    key = "tokenizer.ggml.model"
    only({key: need(metadata, key, WHERE)}, key, (BYTES, gguf.sentencepiece), WHERE)
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    sentences = metadata[key] == gguf.sentencepiece
    tokenizer = _sentencepiece(metadata, tokens) if sentences else _bytes(metadata, tokens, gguf.splits)
    kinds = metadata.get("tokenizer.ggml.token_type") or ()
    marked = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    for token, kind in marked:
        add = tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens
        add([AddedToken(token, special=kind == CONTROL, normalized=False)])
    stated: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in NAMED.items():
        if metadata.get(f"tokenizer.ggml.{key}") is not None:
            stated[name] = tokens[integer(metadata, f"tokenizer.ggml.{key}", len(tokens) - 1, least=0, where=WHERE)]
    # A file without the flag: SentencePiece begins every text with it, as llama.cpp has it.
    key = "tokenizer.ggml.add_bos_token"
    begins = flag(metadata, key, WHERE) if metadata.get(key) is not None else sentences
    if begins:
        first = need(stated, "bos_token", WHERE)
        pair = [(first, tokens.index(first))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=pair)
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        stated["chat_template"] = metadata["tokenizer.chat_template"]
    return tokenizer, stated


def _bytes(metadata: Metadata, tokens: Sequence[str], splits: Mapping[str, Split]) -> Tokenizer:
    """Byte-level BPE."""
    name = "tokenizer.ggml.pre"
    only({name: need(metadata, name, WHERE)}, name, tuple(splits), WHERE)
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, blank, right = merge.partition(" ")
        if not blank or " " in right:
            raise ConfigError(f"{WHERE}: 'tokenizer.ggml.merges' has {merge!r}, expected two tokens with one blank")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(splits[metadata[name]])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(split: Split) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    steps += [pre_tokenizers.Split(Regex(split.pattern), behavior="isolated")] if split.pattern else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    """BPE over characters, with bytes for what the vocabulary lacks. Its merges follow from the scores of tokens: a
    pair is merged before another if the token that it makes has the higher score."""
    scores = need(metadata, "tokenizer.ggml.scores", WHERE)
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ConfigError(f"{WHERE}: 'tokenizer.ggml.scores' has no number for each of {len(tokens)} tokens")
    vocab = {token: n for n, token in enumerate(tokens)}
    pairs = merges_of(dict(zip(tokens, scores, strict=True)))
    key = "tokenizer.ggml.unknown_token_id"
    unknown = tokens[integer(metadata, key, len(tokens) - 1, least=0, default=0, where=WHERE)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    name = "tokenizer.ggml.add_space_prefix"
    prefixed = flag(metadata, name, WHERE) if metadata.get(name) is not None else True
    blanks: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *blanks] if prefixed else blanks)
    after: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefixed else []
    whole: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    tokenizer.decoder = decoders.Sequence(whole)
    return tokenizer


def _strings(metadata: Metadata, key: str) -> list[str]:
    value = need(metadata, key, WHERE)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{WHERE}: {key!r} is no list of strings")
    return value
