"""Words with a content of their own, by tokens of one byte each."""

from __future__ import annotations

import numpy as np
import pytest

from rave_jax.inference.content import content_tokens
from tests.data.conftest import byte_tokenizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is the red sign's number?", ["red", "sign", "number"]),
        ("Which of THESE 12 is it", ["12"]),
        ("Wie groß ist es?", ["Wie", "groß", "ist", "es"]),
        ("What is it?", []),
        ("", []),
    ],
)
def test_words_of_the_closed_list_and_what_is_no_word_are_left_out(text: str, words: list[str]) -> None:
    tokenizer = byte_tokenizer()
    tokens = np.array(tokenizer.encode(text), np.int32)
    found = content_tokens(tokenizer, tokens)
    assert found.shape == tokens.shape
    kept = b"".join(bytes([byte]) if on else b" " for byte, on in zip(text.encode(), found, strict=True))
    assert kept.decode().split() == words


def test_a_special_token_ends_a_word() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.added_tokens_decoder and next(iter(tokenizer.added_tokens_decoder))
    tokens = np.array([*tokenizer.encode("th"), end, *tokenizer.encode("e")], np.int32)
    assert content_tokens(tokenizer, tokens).tolist() == [True, True, False, True]
