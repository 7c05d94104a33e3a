"""Chat templates: the tokens transformers renders, and who speaks each of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rave_jax.batch import Role
from rave_jax.config import ConfigError
from rave_jax.data.chat import ChatTemplate, read_template
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from tests.data.conftest import TEMPLATE

TALK = [
    {"role": "system", "content": "Look well."},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
]


def with_sources(messages: list) -> list:
    """Golden messages have blank picture parts; ours need something to read, which the template never sees."""
    return [
        {
            **m,
            "content": m["content"] if isinstance(m["content"], str) else [{p["type"]: "x", **p} for p in m["content"]],
        }
        for m in messages
    ]


@pytest.mark.parametrize("variant", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_tokens_equal_the_golden_prompts(variant: str, shared_data: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "tokenizer_qwen" / name, tmp_path)
    for path in (shared_data / "tokenizer_qwen" / variant).iterdir():
        shutil.copy(path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    chat = ChatTemplate(tokenizer, read_template(tmp_path, tokenizer))
    cases = json.loads((shared_data / "tokenizer_qwen/golden_hf.json").read_text())[variant]["chat"]
    assert cases
    for case in cases:
        runs = chat.runs(with_sources(case["messages"]), case["add_generation_prompt"])
        assert [number for run in runs for number in run.ids] == case["ids"]


def test_roles_and_what_is_learnt(processor: Processor) -> None:
    chat = processor.chat
    runs = chat.runs(TALK)
    assert [run.role for run in runs] == [Role.SYSTEM, Role.QUESTION, Role.RESPONSE, Role.QUESTION, Role.RESPONSE]
    learnt = [chat._tokenizer.decode(run.ids[slice(*run.learn)]) for run in runs]
    assert learnt == ["", "", "A cat.<|im_end|>", "", "Yes.<|im_end|>"]
    assert [len(run.visuals) for run in runs] == [0, 1, 0, 0, 0]
    assert chat.end_id == chat._tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_preamble_is_the_system_s(processor: Processor) -> None:
    runs = processor.chat.runs(TALK[1:2], add_generation_prompt=True)
    texts = [processor.tokenizer.decode(run.ids) for run in runs]
    assert texts[0] == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert texts[2] == "<|im_start|>assistant\n"
    assert [run.role for run in runs] == [Role.SYSTEM, Role.QUESTION, Role.RESPONSE]
    assert "".join(texts) == processor.chat.render([{"role": "user", "content": TALK[1]["content"]}], True)


@pytest.mark.parametrize("answer", ["\n\nlate", " \n x", "  indented", "", "ends\n\n", "<|im_end|>twice"])
def test_answers_with_odd_ends(answer: str, qwen: Processor) -> None:
    """Tokens stay those of the whole text; what is learnt is a suffix of the answer, with its end token."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    runs = qwen.chat.runs(messages)
    whole = qwen.tokenizer(qwen.chat.render(messages), add_special_tokens=False)["input_ids"]
    assert [number for run in runs for number in run.ids] == whole
    learnt = qwen.tokenizer.decode(runs[-1].ids[slice(*runs[-1].learn)])
    assert (answer + "<|im_end|>").endswith(learnt)
    assert learnt.endswith("<|im_end|>")
    if not answer.lstrip(" ").startswith("\n"):
        assert learnt == answer + "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "without messages"),
        ([{"role": "robot", "content": "hi"}], "role 'robot'"),
        ([{"role": ["user"], "content": "hi"}], "role .'user'."),
        ([{"role": "user", "content": "\ud800"}], "no Unicode"),
        ([{"role": "assistant", "content": "hi"}], "starts with an answer"),
        ([{"role": "user", "content": None}], "expected text or a list"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "part of type 'sound'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "without the key 'image'"),
        ([{"role": "user", "content": "<|im_start|>assistant"}], "does a text hold the token <|im_start|>"),
    ],
)
def test_conversations_that_cannot_be(messages: list, says: str, processor: Processor) -> None:
    with pytest.raises(SampleError, match=says):
        processor.chat.runs(messages)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no header"),
        (
            "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}assistant{% endif %}",
            "no special token before and after",
        ),
        (TEMPLATE + "{% if messages | length > 2 %}<|im_start|>{% endif %}", "each message with one special token"),
    ],
)
def test_templates_that_cannot_be_split(template: str, says: str, processor: Processor) -> None:
    with pytest.raises(ConfigError, match=says):
        ChatTemplate(processor.tokenizer, template)


def test_a_template_is_found_or_missed_by_name(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        read_template(tmp_path, processor.tokenizer)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    assert read_template(tmp_path, processor.tokenizer) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert read_template(tmp_path, processor.tokenizer) == "new"
