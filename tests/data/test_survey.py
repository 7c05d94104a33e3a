"""What samples need, counted from texts and headers: the very numbers that encoding them gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rave_jax.data.processor import Processor
from rave_jax.data.sample import Message, SampleError
from rave_jax.data.sources import QaJsonl, Synthetic
from rave_jax.data.survey import Need, measure, survey
from rave_jax.families.shared.grids.video import VideoLimits
from rave_jax.layout import ContextTokens, VisualLayout
from tests.data.conftest import TEXT_ALONE
from tests.data.pictures import noise


def asked(*parts: Message) -> list[Message]:
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "A"},
    ]


@pytest.mark.parametrize(
    "layout", [None, VisualLayout(context=ContextTokens(3)), VisualLayout(context=ContextTokens(2, "image"))]
)
@pytest.mark.parametrize(
    "limits", [VideoLimits(64, 4096), VideoLimits(64, 4096, fps=1.0, cap_total=True, max_tokens=50)]
)
def test_needs_are_what_encoding_gives(
    layout: VisualLayout | None, limits: VideoLimits, processor: Processor, tmp_path: Path
) -> None:
    settings = dataclasses.replace(processor.rules, video=limits)
    made = Processor(processor.tokenizer, settings, processor.chat._template, layout)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(20, 90)).save(tmp_path / "turned.jpg", exif=exif)
    frames = [noise(24, 40, seed=n) for n in range(7)]
    image = {"type": "image", "image": str(tmp_path / "turned.jpg")}
    video = {"type": "video", "video": frames, "fps": 1.5}
    for messages in (
        asked(),
        asked(image),
        asked(video),
        asked(video, image, {"type": "image", "image": noise(300, 70)}),
    ):
        example = made.encode(messages)
        assert measure(made, messages) == (len(example.tokens), example.patches.length)


def test_a_survey_of_a_source(qa_folder: Path, processor: Processor) -> None:
    (qa_folder / "images/3.jpg").write_bytes(b"no picture")
    source = QaJsonl(str(qa_folder / "qa.jsonl"), name="qa").build()
    found = survey(source, processor)
    assert (found.name, found.length, len(found.tokens)) == ("qa", 10, 8)
    assert [(skip.index, skip.reason) for skip in found.skips] == [(3, "broken image"), (5, "empty answer")]
    small, most = found.percentile(50), found.percentile(100)
    assert small == (61, 48)
    assert most == (1060, 48)
    assert found.share(small) == 7 / 8
    assert found.share(Need(1060, 47)) == 0
    assert [len(survey(source, processor, n).tokens) for n in (1, 2, 4)] == [1, 2, 3]


def test_nothing_is_measured_where_nothing_can_be(qa_folder: Path, processor: Processor) -> None:
    (qa_folder / "qa.jsonl").write_text("{}\n")
    found = survey(QaJsonl(str(qa_folder / "qa.jsonl")).build(), processor)
    assert (found.percentile(99), found.share(Need(1, 1)), len(found.skips)) == ((0, 0), 1.0, 1)
    blind = Processor(processor.tokenizer, TEXT_ALONE, processor.chat._template)
    with pytest.raises(SampleError, match="the model is for text only"):
        measure(blind, asked({"type": "image", "image": np.zeros((8, 8, 3), np.uint8)}))


def test_made_samples_are_measured_too(processor: Processor) -> None:
    found = survey(Synthetic(length=50).build(), processor, 5)
    assert (len(found.tokens), found.skips) == (5, ())
