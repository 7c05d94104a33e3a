"""The tokenizer of Llama 2 from its SentencePiece file, as transformers converts it (SentencePiece is not needed)."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"


def llama_tokenizer(file: Path, legacy: bool) -> PreTrainedTokenizerFast:
    """`legacy` puts a space before every stretch of text between special tokens, else before the first alone."""
    backend = Tokenizer(_model(file))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_pieces(file: Path) -> list[tuple[str, float]]:
    """Text and score of each piece of the vocabulary."""
    return list(_pieces(file.read_bytes()))


@functools.lru_cache
def _model(file: Path) -> models.BPE:
    pieces = llama_pieces(file)
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    scores = dict(pieces)
    splits = ((piece, piece[:n], piece[n:]) for piece in vocab for n in range(1, len(piece)))
    merges = [(scores[whole], left, right) for whole, left, right in splits if left in vocab and right in vocab]
    merges.sort(key=lambda merge: (-merge[0], vocab[merge[1]], vocab[merge[2]]))
    pairs = [(left, right) for _, left, right in merges]
    return models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _pieces(data: bytes) -> Iterator[tuple[str, float]]:
    """Text and score of each piece: field 1 of the file, whose fields 1 and 2 they are (protobuf wire format)."""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            piece, score = fields[1], fields[2]
            assert isinstance(piece, bytes) and isinstance(score, bytes)
            yield piece.decode(), struct.unpack("<f", score)[0]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
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
