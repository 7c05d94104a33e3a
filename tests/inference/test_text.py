"""Text of tokens that come one by one, against what the tokenizer decodes from all of them."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rave_jax.checkpoint.tiny import VOCAB_SIZE
from rave_jax.checkpoint.tiny import byte_tokenizer as tiny_tokenizer
from rave_jax.config import ConfigError
from rave_jax.inference.text import ALPHABET, TextStream
from tests.data.conftest import byte_tokenizer

BYTES = byte_tokenizer()
TINY = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer())
MARK = "\ufffd"
CHARACTER = {byte: character for character, byte in ALPHABET.items()}

words = st.sampled_from(
    [
        "What number",
        " é",
        "日本語",
        "ภาษาไทยก็",
        "e\u0301\u0327",
        "👩‍👩‍👧",
        "🇯🇵",
        "\U0001d4b3",
        "\n",
        "\x00",
        "\u2028",
        " ß",
    ]
)
texts = st.lists(words | st.text(max_size=4), max_size=8).map("".join)


def stream(tokenizer, tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[TextStream, list[str], str]:
    """The stream after all tokens, what each gave, and what was held back."""
    reading = TextStream(tokenizer, stop)
    pieces = [reading.push(token) for token in tokens]
    rest = reading.finish()
    assert reading.text == "".join(pieces) + rest
    assert reading.finish() == ""
    return reading, pieces, rest


def whole(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def until(text: str, stop: Sequence[str]) -> str:
    """The definition: the text before the first place where one of the strings begins."""
    return min((text.split(s)[0] for s in stop), key=len, default=text)


@given(texts)
def test_characters_come_whole_and_as_soon_as_they_are(text: str) -> None:
    """With one token per byte: after n bytes, the characters that n bytes make."""
    tokens = BYTES(text, add_special_tokens=False)["input_ids"]
    data = text.encode()
    assert len(tokens) == len(data)
    reading, pieces, rest = stream(BYTES, tokens)
    assert reading.text == whole(BYTES, tokens) == text and rest == "" and not reading.stopped
    for number, shown in enumerate(itertools.accumulate(pieces), start=1):
        assert shown == data[:number].decode(errors="ignore")


@given(texts, st.integers(0, 2**32))
def test_special_tokens_are_skipped_also_within_a_character(text: str, number: int) -> None:
    rng = random.Random(number)
    skipped = [*TINY.added_tokens_decoder, VOCAB_SIZE - 1, 10**6]  # and ids that no token has
    assert TINY.decode(skipped[-2:]) == ""
    tokens: list[int] = []
    for token in TINY(text, add_special_tokens=False)["input_ids"]:
        tokens += [*rng.sample(skipped, rng.choice([0, 0, 1, 3])), token]
    reading, pieces, _ = stream(TINY, tokens)
    assert reading.text == whole(TINY, tokens)
    assert MARK in text or not any(MARK in piece for piece in pieces)


@given(st.lists(st.integers(0, VOCAB_SIZE + 5) | st.sampled_from(range(128, 256)), max_size=30))
def test_bytes_that_are_no_text_show_as_decode_shows_them(tokens: list[int]) -> None:
    for tokenizer in (TINY, BYTES):
        reading, pieces, _ = stream(tokenizer, tokens)
        assert reading.text == whole(tokenizer, tokens)
        for number, shown in enumerate(itertools.accumulate(pieces), start=1):
            assert whole(tokenizer, tokens[:number]).startswith(shown)
            assert reading.text.startswith(shown), "shown, and then another"


def test_each_pair_of_leading_bytes_is_judged_as_decode_does() -> None:
    """The ranges of a second byte differ by the first (E0, ED, F0, F4); all pairs, with a letter or a third after."""
    by_byte = [BYTES.convert_tokens_to_ids(CHARACTER[byte]) for byte in range(256)]
    for first in [0x41, 0x80, *range(0xBE, 0x100)]:
        for second in range(0x7E, 0xC4):
            for after in ([], [0x41], [0x80, 0x80]):
                tokens = [by_byte[byte] for byte in (first, second, *after)]
                assert stream(BYTES, tokens)[0].text == whole(BYTES, tokens)


def test_an_added_token_reads_as_decode_reads_it() -> None:
    backend = tiny_tokenizer()
    added = ["<tool call>", "<é>", "日本", "<plain>"]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = tokenizer.convert_tokens_to_ids(added)
    assert len({*tokens} - {*tiny_tokenizer().get_vocab().values()}) == 4
    for order in itertools.permutations(tokens):
        assert stream(tokenizer, order)[0].text == whole(tokenizer, order)


LETTERS = "aaba", "abab", "aabaab", "abcaab", "bcabca"
STOPS: tuple[tuple[str, ...], ...] = (("a",), ("ab",), ("aab",), ("aba",), ("ab", "ba"), ("bca", "a"), ("abca", "bc"))
SPLITS = ["".join(p) for n in (1, 2, 3) for p in itertools.product("abc", repeat=n)]
LETTER_TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(vocab={s: n for n, s in enumerate(SPLITS)}, merges=[]))
)
LETTER_TOKENIZER.backend_tokenizer.decoder = decoders.ByteLevel()


def splits(text: str) -> list[list[str]]:
    """All ways to cut the text into pieces of one to three letters."""
    if not text:
        return [[]]
    return [[text[:n], *rest] for n in range(1, min(3, len(text)) + 1) for rest in splits(text[n:])]


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings_at_all_splits(stop: tuple[str, ...]) -> None:
    """All that is certain is shown and nothing else: what every continuation of the text so far begins with."""
    after = ["", *SPLITS]

    def certain(text: str) -> str:
        ends = [until(text + more, stop) for more in after]
        low, high = min(ends), max(ends)  # what these two begin with, all between them do
        return low[: next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]

    for text in LETTERS:
        for pieces in splits(text):
            reading, got, _ = stream(LETTER_TOKENIZER, [SPLITS.index(piece) for piece in pieces], stop)
            assert reading.text == until(text, stop)
            assert reading.stopped == (reading.text != text)
            for so_far, shown in zip(itertools.accumulate(pieces), itertools.accumulate(got), strict=True):
                assert shown == certain(so_far)


@given(st.text("ab é語", max_size=20), st.lists(st.text("ab é語", min_size=1, max_size=3), max_size=3))
def test_stop_strings_of_any_characters(text: str, stop: list[str]) -> None:
    for tokenizer in (TINY, BYTES):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        reading, _, _ = stream(tokenizer, tokens, stop)
        assert reading.text == until(whole(tokenizer, tokens), stop)


def test_after_a_stop_string_nothing_is_shown() -> None:
    reading = TextStream(BYTES, ["END"])
    tokens = BYTES("one END two END", add_special_tokens=False)["input_ids"]
    stopped = [(reading.push(token), reading.stopped) for token in tokens]
    assert reading.text == "one " and reading.finish() == ""
    assert [flag for _, flag in stopped].index(True) == len("one EN")


@pytest.mark.parametrize("stop", ["END", ("",), ("a", ""), (3,)], ids=str)
def test_bad_stop_strings_are_refused(stop) -> None:
    with pytest.raises(ConfigError, match=r"^stop is "):
        TextStream(BYTES, stop)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.Metaspace()
    with pytest.raises(ConfigError, match="Metaspace, expected ByteLevel"):
        TextStream(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize("kind", ["text", "no text", "special"])
def test_what_a_token_has_to_look_at_does_not_grow(kind: str) -> None:
    token = {"text": BYTES.convert_tokens_to_ids("s"), "no text": BYTES.convert_tokens_to_ids(CHARACTER[0xFF])}
    number = token.get(kind, BYTES.convert_tokens_to_ids("<|im_end|>"))
    reading = TextStream(BYTES, ["stop"])
    for _ in range(2000):
        reading.push(number)
        # All that a push reads beside its token: text that may begin a stop string, bytes that may begin a character.
        assert len(reading._held) < len("stop") and len(reading._decoder.getstate()[0]) < 4


@pytest.fixture(scope="module")
def qwen(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    source = shared_data / "tokenizer_qwen"
    if not (source / "qwen2_5_vl").is_dir():
        pytest.skip(f"no tokenizer of Qwen2.5-VL at {source}")
    folder = tmp_path_factory.mktemp("qwen")
    for name in ("vocab.json", "merges.txt", "qwen2_5_vl/tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return AutoTokenizer.from_pretrained(str(folder), config=None)


def test_the_tokenizer_of_qwen(qwen: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    alphabet = "ab ,.\n日本語ภาษาไทย👩\u200d👧🇯🇵é𝒳한국어\u0301"
    ids = [*range(151643 - 50), *qwen.added_tokens_decoder, 151936 - 1]
    for number in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        tokens = qwen(text, add_special_tokens=False)["input_ids"]
        if number % 3 == 0:
            tokens = rng.choices(ids, k=12)
        full = whole(qwen, tokens)
        for stop in ((), tuple("".join(rng.choices(alphabet, k=rng.randint(1, 2))) for _ in range(2))):
            reading, pieces, _ = stream(qwen, tokens, stop)
            assert reading.text == until(full, stop)
            assert number % 3 == 0 or not any(MARK in piece for piece in pieces)
