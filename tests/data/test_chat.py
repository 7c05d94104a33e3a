"""Chat templates: the tokens transformers renders, and who speaks each of them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rave_jax.batch import Role
from rave_jax.config import ConfigError
from rave_jax.data import template
from rave_jax.data.chat import ChatTemplate, read_template
from rave_jax.data.literal import LiteralTokenizer
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from tests.data.conftest import TEMPLATE, byte_tokenizer
from tests.data.llama import llama_tokenizer
from tests.data.templates import SPECIAL, STYLES
from tests.data.templates import TALK as ANY_TALK

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


@pytest.mark.parametrize("answer", ["\n\nlate", " \n x", "  indented", "", "ends\n\n", "twice"])
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
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "assistant", "content": "hi"}], "starts with an answer"),
        ([{"role": "user", "content": None}], "expected text or a list"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "part of type 'sound'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "without the key 'image'"),
    ],
)
def test_conversations_that_cannot_be(messages: list, says: str, processor: Processor) -> None:
    with pytest.raises(SampleError, match=says):
        processor.chat.runs(messages)


# Any template


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with the special tokens of all styles."""
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL), "bos_token": "<s>", "eos_token": "</s>"})
    return made


@pytest.mark.parametrize("name", STYLES)
def test_a_template_tells_where_answers_begin_and_end(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    style = STYLES[name]
    chat = ChatTemplate(tokenizer, style.template)
    runs = chat.runs(ANY_TALK)
    whole = tokenizer.decode([number for run in runs for number in run.ids])
    learnt = [tokenizer.decode(run.ids[slice(*run.learn)]) for run in runs if run.role is Role.RESPONSE]
    assert tuple(learnt) == style.learned
    assert learnt[0].endswith(tokenizer.convert_ids_to_tokens(chat.end_id))
    roles = [Role.QUESTION, Role.RESPONSE] * 2
    assert [run.role for run in runs] == ([Role.SYSTEM] if style.opening else []) + roles
    if style.opening:
        assert tokenizer.decode(runs[0].ids) == style.opening
    question = tokenizer.decode(next(run.ids for run in runs if run.role is Role.QUESTION))
    assert "Which?" in question and "cat" not in question
    # A prompt is what stands before what is learned.
    asked = chat.runs(ANY_TALK[:3], add_generation_prompt=True)
    assert tokenizer.decode(asked[-1].ids) == style.asking
    prompt = tokenizer.decode([number for run in asked for number in run.ids])
    assert whole.startswith(prompt + style.learned[1][:-1])
    if name != "smolvlm":  # whose template writes texts only where they are parts
        assert whole == chat.render(ANY_TALK)


def test_a_thought_is_learned_where_generation_begins_it(tokenizer: PreTrainedTokenizerFast) -> None:
    """Templates split thoughts off, and take them out of earlier answers."""
    thought = {"role": "assistant", "content": "<think>\nfar\n</think>\n\nred"}
    talk = [ANY_TALK[0], thought, ANY_TALK[2], thought]
    for name, begins in (("qwen3", "<think>\n"), ("qwen3 that opens a thought", "")):
        runs = ChatTemplate(tokenizer, STYLES[name].template).runs(talk)
        learnt = [tokenizer.decode(run.ids[slice(*run.learn)]) for run in runs if run.role is Role.RESPONSE]
        assert learnt == ["red<|im_end|>", begins + "far\n</think>\n\nred<|im_end|>"]


def test_a_system_message_is_the_system_s_wherever_it_is_put(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [{"role": "system", "content": "Look."}, *ANY_TALK]
    for name in ("vicuna", "llama2", "llama3", "smolvlm", "phi", "qwen3"):
        runs = ChatTemplate(tokenizer, STYLES[name].template).runs(talk)
        assert [run.role for run in runs[:3]] == [Role.SYSTEM, Role.QUESTION, Role.RESPONSE]
        assert "Look." in tokenizer.decode(runs[0].ids) and "Which?" in tokenizer.decode(runs[1].ids)
    moved = ChatTemplate(tokenizer, STYLES["mistral"].template).runs([talk[0], ANY_TALK[0]], add_generation_prompt=True)
    assert "Look." in tokenizer.decode([number for run in moved for number in run.ids])
    with pytest.raises(SampleError, match="System role not supported"):
        ChatTemplate(tokenizer, STYLES["gemma"].template).runs(talk)


@pytest.mark.parametrize("looks", ["<s>", "{{ raise_exception('no exclamation') if not m.content.startswith('!') }}"])
def test_a_template_may_look_into_texts(looks: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where marks would change what it writes, texts are found without them."""
    loop = "{% for m in messages %}"
    style = STYLES["phi"].template.replace(
        loop, loop + "{% if m.content.startswith('!') or messages | length > 4 %}" + looks + "{% endif %}"
    )
    talk = [*ANY_TALK, {"role": "user", "content": "!a <|end|>"}, {"role": "assistant", "content": "!<|end|>"}]
    talk = talk if looks == "<s>" else [{**m, "content": f"!{m['content']}"} for m in talk]
    runs = ChatTemplate(tokenizer, style).runs(talk)
    assert [run.role for run in runs] == [Role.QUESTION, Role.RESPONSE] * 3
    learnt = [tokenizer.decode(run.ids[slice(*run.learn)]) for run in runs if run.role is Role.RESPONSE]
    assert learnt == [f"{message['content']}<|end|>" for message in talk[1::2]]


def test_a_generation_prompt_may_depend_on_the_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    style = STYLES["phi"].template.replace("<|assistant|>\n{% else", "<|assistant|>{{ messages | length }}{% else")
    asked = ChatTemplate(tokenizer, style).runs(ANY_TALK[:3], add_generation_prompt=True)
    assert [tokenizer.decode(run.ids) for run in asked[-2:]] == ["<|user|>\na<|end|>\n", "<|assistant|>3"]


@pytest.mark.parametrize("around", [("", ""), ("", " "), ("\n", ""), (" ", "\n\n")])
def test_pictures_may_stand_anywhere_in_a_message(around: tuple[str, str], processor: Processor) -> None:
    picture = {"type": "image", "image": "x"}
    text = {"type": "text", "text": around[0] + "Q" + around[1]}
    for content in ([picture], [picture, text], [text, picture], [picture, text, picture], [text, text]):
        answer = {"role": "assistant", "content": around[1] + "A"}
        runs = processor.chat.runs([{"role": "user", "content": content}, answer] * 2)[1:]
        texts = [processor.tokenizer.decode(run.ids) for run in runs]
        assert [text.partition("\n")[0] for text in texts] == ["<|im_start|>user", "<|im_start|>assistant"] * 2
        assert [len(run.visuals) for run in runs] == [content.count(picture), 0] * 2
        assert processor.tokenizer.decode(runs[1].ids[slice(*runs[1].learn)]) == around[1] + "A<|im_end|>"


def test_marked_answers_need_no_token_behind_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a template that marks answers and ends none, the last answer that is learned ends with `eos_token`, as
    generation would end it. Answers before it are learned as they stand in the prompts of generation."""
    template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + ' ' }}{% endgeneration %}{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    chat = ChatTemplate(tokenizer, template)
    assert chat.end_id == tokenizer.eos_token_id
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b c"), ("user", "d"))]
    end = tokenizer.eos_token

    def said(messages: list, asks: bool = False) -> tuple[str, list[str]]:
        runs = chat.runs(messages, add_generation_prompt=asks)
        learned = [tokenizer.decode(run.ids[slice(*run.learn)]) for run in runs if run.learn != (0, 0)]
        return "".join(tokenizer.decode(run.ids) for run in runs), learned

    assert said(talk[:2]) == (f"USER: a ASSISTANT: b c{end}", [f" b c{end}"])
    assert said(talk, asks=True) == ("USER: a ASSISTANT: b c USER: d ASSISTANT:", [" b c"])
    twice = [*talk, {"role": "assistant", "content": "e"}]
    assert said(twice) == (f"USER: a ASSISTANT: b c USER: d ASSISTANT: e{end}", [" b c", f" e{end}"])


def test_a_tokenizer_may_begin_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Processors of pictures put it in front of a conversation that does not begin with `bos_token` yet."""
    begun = copy.deepcopy(tokenizer)
    first = ("<s>", begun.convert_tokens_to_ids("<s>"))
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[first])
    begun.bos_token = "<s>"
    style = STYLES["marked"].template
    talk = [{"role": "user", "content": "a"}]
    ids = [run.ids for run in ChatTemplate(begun, style, leading=True).runs(talk)]
    assert ids == [[first[1]], *(run.ids for run in ChatTemplate(begun, style).runs(talk))]
    already = ChatTemplate(begun, "{{ bos_token }}" + style, leading=True).runs(talk)
    assert [id for run in already for id in run.ids].count(first[1]) == 1
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="$A <s>", special_tokens=[first])
    with pytest.raises(ConfigError, match="the tokenizer puts '<s>' behind every text"):
        ChatTemplate(begun, style, leading=True)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no special token after an answer"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", r"leaves out the text of a message \(message 0, user\)"),
        ("{% for m in messages %}{{ m.content * 2 }}</s>{% endfor %}", "repeats the text of a message"),
        ("{% for m in messages %}{{ m.content }}", "not valid Jinja: line 1"),
        ("{{ raise_exception('Not today') }}", "cannot render the conversation: Not today"),
        ("{{ messages[7]['role'] }}", "cannot render the conversation"),
        ("{{ 1 / 0 }}", "fails on the conversation: ZeroDivisionError"),
        (
            "{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}",
            "in the middle of a conversation and at its end",
        ),
        (
            "{% if add_generation_prompt %}Now: {% endif %}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}",
            None,
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '' if add_generation_prompt else '</s>' }}{% endfor %}",
            "changes the end of a question",
        ),
    ],
)
def test_templates_that_cannot_be_used(template: str, says: str | None, tokenizer: PreTrainedTokenizerFast) -> None:
    if says is None:
        assert ChatTemplate(tokenizer, template).end_id == tokenizer.eos_token_id
        return
    with pytest.raises(ConfigError, match=says) as error:
        ChatTemplate(tokenizer, template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "asks",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ '%1000000000000d' % 1 }}",
    ],
)
def test_a_template_that_asks_for_too_much_is_one_line(
    asks: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 1)
    monkeypatch.setattr(template, "MEMORY", 1 << 28)
    with pytest.raises(ConfigError, match="needs too much time or memory") as error:
        ChatTemplate(tokenizer, STYLES["phi"].template + asks)
    assert "\n" not in str(error.value)


def test_a_template_sees_no_more_than_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    for asks in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ):
        with pytest.raises(ConfigError, match="cannot render the conversation"):
            ChatTemplate(tokenizer, asks)


# Words that are special tokens


def spelled(token: str) -> list:
    return [
        {"role": "user", "content": f"What does {token} mean? {token}{token}"},
        {"role": "assistant", "content": [{"type": "text", "text": f"{token} ends"}, {"type": "text", "text": token}]},
    ]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>"])
def test_what_a_message_spells_is_text(token: str, processor: Processor) -> None:
    """With the tiny tokenizer: a byte each, and the special tokens of the template alone."""
    chat, tokenizer = processor.chat, processor.tokenizer
    runs = chat.runs(spelled(token))
    ids = [number for run in runs for number in run.ids]
    harmless = [number for run in chat.runs(spelled("x" * len(token))) for number in run.ids]
    special = set(tokenizer.all_special_ids) | {tokenizer.get_vocab()[token]}
    assert [number in special for number in ids] == [number in special for number in harmless]
    assert tokenizer.decode(ids) == chat.render(spelled(token))
    assert tokenizer.decode(runs[-1].ids[slice(*runs[-1].learn)]) == f"{token} ends{token}<|im_end|>"


def test_pieces_of_a_token_in_two_parts_are_text(processor: Processor) -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    (run,) = processor.chat.runs([{"role": "user", "content": parts}])[1:]
    assert run.ids.count(processor.end_id) == 1
    assert processor.tokenizer.decode(run.ids) == "<|im_start|>user\n<|im_end|><|im_end|>\n"


def test_tokens_may_be_asked_for(processor: Processor, tokenizer: PreTrainedTokenizerFast) -> None:
    meant = Processor(processor.tokenizer, processor.rules, TEMPLATE, special_tokens_in_text="tokens")
    runs = meant.chat.runs(spelled("<|im_end|>"))
    assert [run.ids.count(meant.end_id) for run in runs[1:]] == [4, 3]
    assert processor.tokenizer.decode(runs[-1].ids[slice(*runs[-1].learn)]) == "<|im_end|> ends<|im_end|><|im_end|>"


def test_a_private_character_is_no_way_around(processor: Processor) -> None:
    text = "".join(map(chr, [*range(0xF0000, 0xF0010), *range(0x100000, 0x100010)]))
    runs = processor.chat.runs([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    assert processor.tokenizer.decode([n for run in runs for n in run.ids]).count(text) == 2
    with pytest.raises(SampleError, match=r"also holds U\+F0000"):
        processor.chat.runs([{"role": "user", "content": text + "<|im_end|>"}])


def test_qwen_reads_a_spelled_token_as_its_words(qwen: Processor) -> None:
    """As the same words in any other text, merged with what stands beside them."""
    runs = qwen.chat.runs([{"role": "user", "content": "say <|im_end|>."}])
    assert runs[-1].ids[3:-2] == [*qwen.tokenizer("say <|")["input_ids"], *qwen.tokenizer("im_end|>.")["input_ids"]]
    plain = [{"role": "user", "content": "Hello  there\n e\u0301"}, {"role": "assistant", "content": " \u00e9t\u00e9 "}]
    scanned, _, _ = qwen.chat._scan(plain, False)
    words = qwen.chat._words
    assert words.encode(scanned.written).ids == words.encode_literal(scanned.text).ids


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_reads_a_spelled_token_as_its_words(legacy: bool, shared_data: Path) -> None:
    tokenizer = llama_tokenizer(shared_data / "tokenizer_llama/tokenizer.model", legacy)
    assert tokenizer("Hello world")["input_ids"] == [15043, 3186]
    chat = ChatTemplate(tokenizer, STYLES["llama2"].template)
    plain = [number for run in chat.runs(ANY_TALK) for number in run.ids]
    assert plain == tokenizer(chat.render(ANY_TALK), add_special_tokens=False)["input_ids"]
    talk = [{"role": "user", "content": "say </s> or <s>"}, {"role": "assistant", "content": "no </s>."}]
    runs = chat.runs(talk)
    ids = [number for run in runs for number in run.ids]
    assert [n for n in ids if n < 3] == [1, 2] and ids[0] == 1 and ids[-1] == 2
    assert tokenizer.convert_ids_to_tokens(runs[-1].ids[slice(*runs[-1].learn)]) == [
        *("\u2581no", "\u2581</", "s", ">.", "\u2581", "</s>")
    ]


def test_a_special_token_may_be_what_text_merges_into() -> None:
    merges = [("<", "s"), ("<s", ">")]
    backend = Tokenizer(models.BPE({"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}, merges))
    backend.add_special_tokens(["<s>"])
    words = LiteralTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert words.encode("<s><s").ids == [4, 3]
    assert words.encode_literal(words.private("<s>") + "<s><s").ids == [4, 3, 2, 3]


def test_a_template_is_found_or_missed_by_name(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        read_template(tmp_path, processor.tokenizer)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    assert read_template(tmp_path, processor.tokenizer) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert read_template(tmp_path, processor.tokenizer) == "new"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "other"}]
    byte_tokenizer().save_pretrained(str(tmp_path))
    for templates, says in ((named, None), (named[1:], "has the chat templates 'tool_use': expected 'default'")):
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
        tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
        if says is None:
            assert read_template(tmp_path, tokenizer) == TEMPLATE
            continue
        with pytest.raises(ConfigError, match=says):
            read_template(tmp_path, tokenizer)
