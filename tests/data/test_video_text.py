"""Videos that become text before a conversation becomes tokens."""

from __future__ import annotations

from typing import Any

import pytest

from rave_jax.data.chat import ChatTemplate
from rave_jax.data.literal import LiteralTokenizer
from rave_jax.data.marks import mark
from rave_jax.data.sample import SampleError
from rave_jax.data.template import Rendered
from rave_jax.data.video_text import VideoText, spell_videos
from tests.data.conftest import TEMPLATE, byte_tokenizer

IMAGE = "<|image_pad|>"
VIDEO = "[clip]"
WRITES = TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", VIDEO)
"""A template whose placeholder of videos is no token."""


def asked(*parts: str | None) -> list[dict[str, Any]]:
    """A question of texts, and videos where there are none, with its answer."""
    content = [{"type": "text", "text": part} if part else {"type": "video", "video": []} for part in parts]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "four"}]


def chat(special_tokens_in_text: Any = "text", template: str = WRITES) -> ChatTemplate:
    videos = VideoText(VIDEO, lambda part: f"Frames: {IMAGE}.")
    return ChatTemplate(byte_tokenizer(), template, special_tokens_in_text, videos=videos)


def test_the_text_and_what_stands_around_it_become_tokens_together() -> None:
    runs = chat().runs(asked("See", None, "What?", None))
    text = byte_tokenizer().decode([i for run in runs for i in run.ids])
    assert text.endswith(
        f"<|im_start|>user\nSeeFrames: {IMAGE}.What?Frames: {IMAGE}.<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    )
    question, answer = runs[-2:]
    assert [part["type"] for part in question.visuals] == ["video", "video"]
    assert byte_tokenizer().decode(answer.ids[slice(*answer.learn)]) == "four<|im_end|>"


def test_a_placeholder_that_a_message_spells_out_is_text() -> None:
    """Where special tokens in texts are tokens, it counts as one, as in transformers."""
    (question,) = chat().runs(asked(f"a {VIDEO} of", None))[1:-1]
    text = byte_tokenizer().decode(question.ids)
    assert text.endswith(f"a {VIDEO} ofFrames: {IMAGE}.<|im_end|>\n")
    message = r"the rendered text has 2 placeholders '\[clip\]', but the conversation has 1 videos"
    with pytest.raises(SampleError, match=message):
        chat("tokens").runs(asked(f"a {VIDEO} of", None))
    with pytest.raises(SampleError, match=r"has 1 placeholders .*, but the conversation has 0 videos"):
        chat("tokens").runs(asked(f"a {VIDEO} of"))


def test_a_template_that_leaves_videos_out_is_refused() -> None:
    with pytest.raises(SampleError, match=r"has 0 placeholders .*, but the conversation has 1 videos; does the chat"):
        chat(template=TEMPLATE).runs(asked("a", None))


def test_what_a_template_marks_as_answers_moves_with_the_text() -> None:
    tokenizer = LiteralTokenizer(byte_tokenizer())
    marked = mark([{"role": "user", "content": "a"}], tokenizer, literal=True, around=False)
    rendered = Rendered(f"one {VIDEO} two {VIDEO} three", ((0, 3), (11, 14), (22, 27)))
    found = spell_videos(rendered, marked, VIDEO, ["", "a long text"])
    assert found.text == "one  two a long text three"
    assert [found.text[start:stop] for start, stop in found.answers] == ["one", "two", "three"]


def test_learned_answers_are_those_of_the_template_without_videos() -> None:
    generation = TEMPLATE.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}", 1)
    runs = chat(template=generation.replace("<|vision_start|><|video_pad|><|vision_end|>", VIDEO)).runs(
        asked("b", None)
    )
    answer = runs[-1]
    assert byte_tokenizer().decode(answer.ids[slice(*answer.learn)]).startswith("four")
