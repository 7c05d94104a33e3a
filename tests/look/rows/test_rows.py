"""The page of rows: what stands in the batch stands on it, and nothing else does."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rave_jax.attention import Gaze
from rave_jax.batch import Batch, Kind
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.layout import region_major
from rave_jax.data.sample import Example
from rave_jax.families.shared.grids.images import resize
from rave_jax.layout import ContextTokens
from rave_jax.look.rows import PackedRow, Spelling, packed_rows, page
from rave_jax.models.config import ModelOptions
from tests.data.conftest import byte_tokenizer
from tests.data.llama import llama_tokenizer
from tests.data.pictures import noise
from tests.families.every import SIZES, WITH_PICTURES, Small, answer, question, small

LAYOUT = ModelOptions((Gaze(top_k=2, max_regions=64),), context=ContextTokens(2))


class Page(HTMLParser):
    """What a browser would find: tags, texts and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def qwen() -> Small:
    return small("qwen2_5_vl", LAYOUT)


def rows_of(
    of: Small, rows: list[list[Example]], tokens: int = 300, patches: int = 200
) -> tuple[Batch, list[PackedRow]]:
    sizes = of.processor.rules.patch_sizes
    patches = -(-patches // sizes.window) * sizes.window
    batch = collate(rows, BatchShape(len(rows), tokens, patches), sizes)
    return batch, packed_rows(batch, of.config, Spelling(of.processor.tokenizer), step=3)


def test_a_row_says_what_the_batch_holds(qwen: Small) -> None:
    """Counts, learned tokens and their weights, positions, documents and the padding behind them."""
    weighted = {"role": "assistant", "content": "56", "weight": 0.5}
    documents = [
        region_major(qwen.encode(question("12?", (40, 60), (20, 30)), weighted)),
        qwen.encode(question("only text"), answer("78")),
    ]
    batch, (row, empty) = rows_of(qwen, [documents, []])
    first, second = (len(document.tokens) for document in documents)
    counts = row.counts
    assert (counts["documents"], counts["tokens"], counts["of"]) == (2, first + second, 300)
    assert counts["learned"] == int((batch.loss_weights[0] != 0).sum()) > 0
    assert counts["patches"] == documents[0].patches.length
    assert counts["pictures"] == 2
    assert counts["regions"] == int(batch.info.region[0].max())
    assert counts["context"] == int((batch.info.kind[0] == Kind.CONTEXT).sum()) == 4
    assert (empty.counts["documents"], empty.counts["tokens"], empty.frames) == (0, 0, ())
    for token in row.tokens[: first + second]:
        assert token.id == batch.tokens[0, token.index]
        assert token.positions == tuple(batch.positions[:, 0, token.index])
        # The weight stands where the token is predicted: on the one before it.
        before = batch.loss_weights[0, token.index - 1] if token.index else 0
        assert token.learned == before
        if before:
            assert batch.targets[0, token.index - 1] == token.id
    assert {token.learned for token in row.tokens} == {0.0, 0.5, 1.0}
    assert [run.document for run in row.runs][-1] == 0
    assert sum(len(run.tokens) for run in row.runs) == 300


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_pictures_are_put_together_from_patches(family: str) -> None:
    """Cut again, they give the very patches of the batch; every visual token that is made of one has its cell."""
    of = small(family, ModelOptions())
    example = of.encode(question("12?", (50, 33)), answer("5"))
    batch, (row,) = rows_of(of, [[example]], 900, 700)
    patches, tower = example.patches, of.config.vision
    assert tower is not None and patches.pixels.dtype == np.uint8
    side = tower.patch_size
    for frame in row.frames:
        pixels = np.asarray(frame.pixels[0])
        (mine,) = np.nonzero((patches.frame == frame.number) & (patches.place >= 0).all(-1))
        for patch in mine.tolist():
            y, x = patches.place[patch] * side
            block = patches.pixels[patch].reshape(3, -1, side, side)[:, 0].transpose(1, 2, 0)
            np.testing.assert_array_equal(pixels[y : y + side, x : x + side], block)
    visual = set(np.nonzero(batch.info.kind[0] == Kind.VISUAL)[0].tolist())
    shown = {cell.token for frame in row.frames for cell in frame.cells}
    learned = {token for token in visual if tower.mixed and example.patches.source[example.visual_index[token]][0] < 0}
    assert shown == visual - learned
    assert sum(frame.patches for frame in row.frames) == patches.length


def test_a_picture_is_the_resized_one(qwen: Small) -> None:
    picture = noise(61, 90)
    example = qwen.encode({"role": "user", "content": [{"type": "image", "image": picture}]}, answer("5"))
    (frame,) = rows_of(qwen, [[region_major(example)]])[1][0].frames
    wide, high = frame.pixels[0].size
    np.testing.assert_array_equal(np.asarray(frame.pixels[0]), resize(Image.fromarray(picture), high, wide))
    unit = 2 * SIZES["patch_size"]
    boxes = {cell.token: cell.box for cell in frame.cells}
    info = region_major(example).info
    for token, box in boxes.items():
        assert box[:2] == (info.col[token] * unit, info.row[token] * unit)
        assert box[2] - box[0] == box[3] - box[1] == unit


def test_the_steps_of_a_video_are_shown_side_by_side(qwen: Small) -> None:
    frames = [noise(28, 28, seed=n) for n in range(3)]
    example = qwen.encode({"role": "user", "content": [{"type": "video", "video": frames, "fps": 1.0}]}, answer("5"))
    first, last = rows_of(qwen, [[example]])[1][0].frames
    assert (len(first.pixels), len(last.pixels)) == (2, 1), "the last frame fills its patches twice"


HOSTILE = "<script>alert(1)</script> \"quoted\" 'so' & </section> \x07 é ☃ 👩‍🚀 \u202e"


def test_texts_of_the_data_can_do_nothing(qwen: Small) -> None:
    example = qwen.encode(question(HOSTILE, (28, 28)), answer(HOSTILE))
    _, rows = rows_of(qwen, [[example]], 500)
    text = page(rows, "Rows <b>", ["qa[3] (broken image): <img src=x onerror=alert(1)>"])
    found = Page(text)
    assert not {"script", "b", "link", "iframe", "object"} & set(found.tags)
    assert found.tags.count("img") == 1
    assert "qa[3] (broken image): <img src=x onerror=alert(1)>" in "".join(found.texts)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    sources = [value for name, value in found.attributes if name in ("src", "href")]
    assert all(value and value.startswith(("data:image/png;base64,", "#s3r")) for value in sources)
    assert "http://" not in text and "https://" not in text
    assert "\x07" not in text and "␇" in text
    data = next(value.partition(",")[2] for value in sources if value and value.startswith("data:"))
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == rows[0].frames[0].pixels[0].size


def test_weights_are_said_where_they_change(qwen: Small) -> None:
    example = qwen.encode(
        question("1?"), answer("22"), question("3?"), {"role": "assistant", "content": "44", "weight": 0.25}
    )
    _, rows = rows_of(qwen, [[example]])
    assert re.findall("<sup>(.*?)</sup>", page(rows, "Rows")) == ["&times;0.25"]


def test_rows_that_hold_nothing_and_holes_are_shown(qwen: Small) -> None:
    _, rows = rows_of(qwen, [[], [qwen.encode(question("1?"), answer("2"))]], 64)
    text = page(rows, "Rows")
    assert "padding · 64 tokens" in text and "1 document · " in text and "0 documents · " in text


def test_pieces_of_characters_are_written_in_bytes() -> None:
    tokenizer = byte_tokenizer()
    spelling = Spelling(tokenizer)
    spelt = spelling([*tokenizer.encode("a ☃\n"), tokenizer.eos_token_id, 9_999_999])
    assert [one.text for one in spelt] == ["a", " ", "\\xe2", "\\x98", "\\x83", "\n", "<|im_end|>", "[9999999]"]
    assert [one.look for one in spelt] == ["text", "text", *["bytes"] * 3, "text", "special", "none"]
    assert [one.whole for one in spelt][2:5] == ["☃"] * 3
    halves = spelling([*tokenizer.encode("☃")[1:], *tokenizer.encode("☃☃")])
    assert [one.whole for one in halves] == ["", "", *["☃"] * 6]
    assert [one.closes for one in halves] == [False] * 4 + [True, False, False, True]


def test_sentencepiece_spaces_and_bytes(shared_data: Path) -> None:
    """A byte that the vocabulary has no character for is a token named `<0xE2>`."""
    tokenizer = llama_tokenizer(shared_data / "tokenizer_llama" / "tokenizer.model", legacy=True)
    spelt = Spelling(tokenizer)(tokenizer.encode("a b 👩", add_special_tokens=False))
    assert "".join(one.text for one in spelt if one.look == "text").strip() == "a b"
    pieces = [one for one in spelt if one.look == "bytes"]
    assert [one.text for one in pieces] == ["\\xf0", "\\x9f", "\\x91", "\\xa9"]
    assert {one.whole for one in pieces} == {"👩"}
