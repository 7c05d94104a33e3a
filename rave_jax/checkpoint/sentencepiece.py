"""A SentencePiece file as a fast tokenizer, as transformers makes one of it for Llama; no SentencePiece is needed.

The file is a protobuf message: pieces (field 1: text 1, score 2, type 3) and how they were trained (field 2: model type
3). Pairs of pieces that make a piece are merged in the order of its score.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rave_jax.checkpoint.safetensors_file import CheckpointError

SPACE = "\u2581"
BPE = 2
"""Model type of byte pair encoding."""
CONTROL = {2, 3}
"""Types of pieces that stand in no text: the unknown one, and such as `<s>`."""


def sentencepiece_tokenizer(file: Path, legacy: bool) -> Tokenizer:
    """The tokenizer of a file.

    Args:
        file: usually tokenizer.model.
        legacy: put a space before every stretch of text between special tokens, else before the first alone.

    Raises:
        CheckpointError: the file cannot be read, or holds no model of byte pair encoding.
    """
    model, special = _model(file)
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


@functools.lru_cache(maxsize=4)
def _model(file: Path) -> tuple[models.BPE, Sequence[str]]:
    """The model, and its special tokens."""
    try:
        data = file.read_bytes()
        pieces = pieces_of(file)
        trained = dict(next((_fields(value) for n, value in _fields(data) if n == 2 and isinstance(value, bytes)), ()))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{file}: is no SentencePiece file, or a damaged one") from error
    if not pieces or trained.get(3, 1) != BPE:
        raise CheckpointError(f"{file}: expected a SentencePiece file of byte pair encoding")
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    pairs = merges_of({text: score for text, score, _ in pieces})
    unknown = next((text for text, _, kind in pieces if kind == 2), None)
    model = models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    return model, [text for text, _, kind in pieces if kind in CONTROL]


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a vocabulary: pairs of tokens that make a token, in the order of its score.

    Args:
        scores: of every token, in the order of their ids.
    """
    place = {text: number for number, text in enumerate(scores)}
    splits = ((whole, whole[:n], whole[n:]) for whole in scores for n in range(1, len(whole)))
    merges = [(-scores[whole], place[a], place[b], a, b) for whole, a, b in splits if a in place and b in place]
    return [(a, b) for *_, a, b in sorted(merges)]


def pieces_of(file: Path) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a file."""
    return list(_pieces(file.read_bytes()))


def _pieces(data: bytes) -> Iterator[tuple[str, float, int]]:
    """Text, score and type of each piece."""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            piece, score, kind = fields[1], fields.get(2, bytes(4)), fields.get(3, 1)
            if not (isinstance(piece, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
                raise KeyError(number)
            yield piece.decode(), struct.unpack("<f", score)[0], kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of the fields of a protobuf message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[place : place + length]
        place += length
