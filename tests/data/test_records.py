"""Records as data sets write them: every shape is read whole, and what is not read is refused by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data.config import DataConfig
from rave_jax.data.loading import check_answers
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sample import METRICS, EmptyAnswer, Sample, SampleError
from rave_jax.data.sources import LlavaJson, QaJsonl
from rave_jax.data.sources.keys import ANNOTATIONS, CONTENT, METADATA
from rave_jax.evaluation import metrics
from tests.data.test_sources import png

Json = dict[str, Any]
PNG = "data:image/png;base64," + base64.b64encode(png(0)).decode()


def one(folder: Path, record: Any, kind: type[LlavaJson] | type[QaJsonl] = LlavaJson, **fields: Any) -> Sample:
    """The sample of a file with one record."""
    (folder / "d.jsonl").write_text(json.dumps(record) + "\n")
    return kind(str(folder / "d.jsonl"), **fields).build()[0]


def talk(**more: Any) -> Json:
    return {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], **more}


def said(*turns: tuple[str, Any], **more: Any) -> Json:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def spelt(sample: Sample) -> list[tuple[str, str]]:
    """Role and text of each message, pictures as `[name]` and videos as `{names}`."""

    def text(part: Any) -> str:
        if part["type"] == "text":
            return part["text"]
        if part["type"] == "video":
            return "{" + " ".join(Path(frame).name for frame in part["video"]) + f" {part.get('fps')}" + "}"
        return f"[{'bytes' if isinstance(part['image'], bytes) else Path(part['image']).name}]"

    return [
        (m["role"], m["content"] if isinstance(m["content"], str) else "".join(map(text, m["content"])))
        for m in sample.messages
    ]


QA = [("user", "Q"), ("assistant", "A")]
SYSTEM = [("system", "S"), *QA]
SHAPES: dict[str, tuple[Json, list[tuple[str, str]]]] = {
    "system beside the turns": (talk(system="S"), SYSTEM),
    "the same system twice": (said(("system", "S"), *QA, system="S"), SYSTEM),
    "an empty system": (talk(system="", tools="", history=[]), QA),
    "openai": (said(*SYSTEM), SYSTEM),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, QA),
    "alpaca with all": (
        {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]]},
        [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Q\nI"), ("assistant", "A")],
    ),
    "alpaca with a picture": (
        {"instruction": "<image>Q", "output": "A", "images": ["a.png"]},
        [("user", "[a.png]Q"), ("assistant", "A")],
    ),
    "query and response": (
        {"query": "Q", "response": "A", "history": [["q", "a"]]},
        [("user", "q"), ("assistant", "a"), *QA],
    ),
    "pairs": ({"texts": [{"user": "Q", "assistant": "A", "source": "here"}]}, QA),
    "a picture of a part's own": (
        said(("user", [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Q"}]), ("assistant", "A")),
        [("user", "[b.png]Q"), ("assistant", "A")],
    ),
    "own pictures by path and url": (
        said(
            ("user", [{"type": "image", "path": "b.png"}, {"type": "image", "url": "file://c.png"}]), ("assistant", "A")
        ),
        [("user", "[b.png][c.png]"), ("assistant", "A")],
    ),
    "own pictures and those of the record": (
        said(
            ("user", [{"type": "image"}, {"type": "image", "image": "b.png"}, {"type": "text", "text": "<image>Q"}]),
            ("assistant", "A"),
            images=["1.png", "2.png"],
        ),
        [("user", "[1.png][b.png][2.png]Q"), ("assistant", "A")],
    ),
    "own pictures listed again": (
        said(("user", [{"type": "image", "image": "b.png"}]), ("assistant", "A"), images=["b.png"]),
        [("user", "[b.png]"), ("assistant", "A")],
    ),
    "parts without a type": (
        said(("user", [{"image": "b.png"}, {"text": "Q"}]), ("assistant", "A")),
        [("user", "[b.png]Q"), ("assistant", "A")],
    ),
    "image_url by path": (
        said(("user", [{"type": "image_url", "image_url": {"url": "b.png", "detail": "high"}}]), ("assistant", "A")),
        [("user", "[b.png]"), ("assistant", "A")],
    ),
    "image_url by data": (
        said(("user", [{"type": "image_url", "image_url": PNG}]), ("assistant", "A")),
        [("user", "[bytes]"), ("assistant", "A")],
    ),
    "a record's data": (talk(image=PNG), [("user", "[bytes]Q"), ("assistant", "A")]),
    "placeholders in an answer": (
        said(("user", "<image>Q"), ("assistant", "<image> or <video>"), images=["a.png"]),
        [("user", "[a.png]Q"), ("assistant", "<image> or <video>")],
    ),
    "a placeholder in the system": (
        said(("system", "Look at <image>"), *QA, image="a.png"),
        [("system", "Look at[a.png]"), *QA],
    ),
    "videos": (
        said(("user", "<video>or<video>?"), ("assistant", "A"), videos=[["1.png", "2.png"], ["3.png"]], fps=[1, 2]),
        [("user", "{1.png 2.png 1}or{3.png 2}?"), ("assistant", "A")],
    ),
    "a video of a part's own": (
        said(("user", [{"type": "video", "video": ["1.png", "2.png"], "fps": 2.0}]), ("assistant", "A")),
        [("user", "{1.png 2.png 2.0}"), ("assistant", "A")],
    ),
    "turns by columns": ({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}, QA),
    "turns of two shapes in one table": (
        {"messages": [turn | {"from": None, "value": None, "user": None} for turn in said(*QA)["messages"]]},
        QA,
    ),
    "an object that is no picture": (talk(image={"bytes": None, "path": None}), QA),
    "a picture whose bytes are elsewhere": (
        talk(image={"bytes": "", "path": "a.png"}),
        [("user", "[a.png]Q"), ("assistant", "A")],
    ),
    "no tools, written as JSON": (talk(tools="[]"), QA),
    "an empty text as history": ({"query": "Q", "response": "A", "history": ""}, QA),
    "counts and names of a picture": (
        talk(image="a.png", image_h=3, n_images=1, prompt_id="x", url="https://here/a.png", file_name="a.png"),
        [("user", "[a.png]Q"), ("assistant", "A")],
    ),
    "metadata": (talk(id=7, model="m", metadata={"a": [1]}, source="coco", num_tokens=3, verified=True, note=""), QA),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_are_read(shape: str, tmp_path: Path, processor: Processor) -> None:
    record, expected = SHAPES[shape]
    for name in ("1.png", "2.png", "3.png", "a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(png(0))
    sample = one(tmp_path, record)
    assert spelt(sample) == expected
    assert sample.answers == (expected[-1][1],)
    if "url" not in shape or "image_url" in shape:  # c.png is no path from the root
        example = processor.encode(sample.messages)
        assert example.loss_mask.sum() == sum(len(text) + 1 for role, text in expected if role == "assistant")


PART = {"type": "text", "text": "Q"}
REFUSED: list[tuple[Json, str]] = [
    (talk(tools=[{"name": "f"}]), "'tools' of the record is not read: tool calls are not supported"),
    (talk(audio="a.wav"), "'audio' of the record is not read: audio is not supported"),
    (talk(sytem="S"), "'sytem' of the record is not read; did you mean 'system'"),
    (talk(wieght=0), "'wieght' of the record is not read"),
    (talk(weight=0.5), "'weight' of the record is not read: give each answer a 'weight'"),
    (talk(image_path="a.png"), "'image_path' of the record is not read: a picture belongs under 'image'"),
    (talk(note="read me"), "'note' of the record is not read.*add it to the source's field `ignored`"),
    (talk(rationale="because"), "'rationale'"),
    (talk(chosen="x", rejected="y"), "'chosen' of the record is not read: .*; the key 'rejected' of the record is not"),
    (talk(output="x"), "'conversations' holds the turns, so 'output' is not read"),
    (talk(messages=said(*QA)["messages"]), "'conversations' and 'messages' both hold turns"),
    (talk(system="S") | {"conversations": said(("system", "T"), *QA)["messages"]}, "different system messages"),
    (talk(system=["S"]), "system is \\['S'\\], expected a text"),
    ({"dialog": [1], "id": 1}, "no turns found: the record has the keys 'dialog', 'id'; expected 'conversations'"),
    ({"question": "Q", "answers": ["A"]}, "no turns found: .*QaJsonl reads"),
    ({}, "no turns found: the record has the keys none"),
    ({"conversations": []}, "no turns found: 'conversations' is \\[\\], expected a list of turns"),
    ({"conversations": "hello"}, "no turns found: 'conversations' is 'hello'"),
    ({"instruction": "Q"}, "the record has 'instruction' but no 'output'"),
    ({"instruction": "Q", "output": ["A"]}, "output is \\['A'\\], expected a text"),
    ({"instruction": "Q", "output": "A", "history": [["q"]]}, "history is .* expected a list of pairs"),
    ({"instruction": "Q", "output": "A", "response": "B"}, "so 'response' is not read"),
    ({"messages": [{"role": "user", "content": "Q", "tool_calls": [{"id": 1}]}]}, "'tool_calls' of a turn by 'user'"),
    ({"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "'function_call'"),
    ({"messages": [{"role": "assistant", "content": "A", "reasoning_content": "R"}]}, "put it into the answer"),
    (said(("tool", "42")), "the role of a turn is 'tool'.*tool calls are not supported"),
    ({"conversations": [{"from": "observation", "value": "42"}]}, "'observation'.*tool calls"),
    ({"conversations": [{"from": ["human"], "value": "Q"}]}, "the role of a turn is \\['human'\\]"),
    (said(("developer", "S")), "did you mean 'system'"),
    (
        said(("user", [{"type": "input_audio", "input_audio": {"data": ""}}])),
        "part of type 'input_audio' in a user turn",
    ),
    (said(("user", [{"type": "input_text", "text": "Q"}])), "did you mean 'text'"),
    (said(("user", [{**PART, "image": "a.png"}])), "'image' of a text part is not read"),
    (said(("user", [{"type": "text"}])), "the text of a user turn's part is None"),
    (said(("user", [{"type": "image", "image": "a", "path": "b"}])), "under 'image' and 'path'"),
    (said(("user", [{"type": "image_url"}])), "image_url part without"),
    (said(("user", "Q"), ("assistant", [{"type": "image", "image": "a.png"}])), "an answer can only be text"),
    (said(("user", [{"type": "image", "image": "b.png"}]), ("assistant", "A"), images=["c.png"]), "1 pictures, but"),
    (talk(image=""), "a picture is '': expected a path; leave the key out"),
    (talk(images=["a.png", ""]), "a picture is ''"),
    (talk(image="https://here/a.png"), "files are not downloaded: save it and give its path"),
    (said(("user", [{"type": "image_url", "image_url": {"url": "http://a/b"}}])), "not downloaded"),
    (talk(image="data:image/png"), "a data URI without a comma; expected data:image/png;base64"),
    (talk(image="data:image/png;base64,x!"), "the base64 of its data URI is broken"),
    (talk(image="A" * 5000), "5000 characters, which is too long for a path"),
    (talk(image="a.png", images=["b.png"]), "'image' and 'images' hold different pictures"),
    (talk(image=[["a.png"]]), "a picture is \\['a.png'\\]"),
    (talk(video=7), "a video is 7, expected a video file, a folder of frames or a list of them"),
    (talk(video="http://here/clip.mp4"), "not downloaded: save it and give its path"),
    (talk(video="data:image/png;base64,AA=="), "this data URI is one picture; a video is a list of frames"),
    (said(("user", [{"type": "video", "video": "a.mp4", "url": "b.mp4"}])), "under 'video' and 'url'"),
    (talk(videos="clip.mp4"), "videos is 'clip.mp4', expected a list"),
    (talk(video=[7]), "a picture is 7"),
    (talk(fps=2), "'fps' is given but no video: add the video or leave 'fps' out"),
    (said(("user", "<image>Q"), ("assistant", "A"), video=["a.png"]), "write <video> for its video"),
    (said(("user", "See <img>a/b.jpg</img>")), "a text names a picture as '<img>a/b.jpg</img>': write <image> in"),
    (said(("user", [{"image": "a.png", "max_pixels": 9}])), "'max_pixels' of an image part is not read: data.min_pix"),
    (talk(url="https://here/a.png"), "'url' of the record is not read"),
    (talk(videos=[["a.png"]], fps=[1, 2]), "fps has 2 numbers for 1 videos"),
    (talk(id=[1]), "id is \\[1\\]"),
]


@pytest.mark.parametrize(("record", "says"), REFUSED)
def test_what_is_not_read_is_refused_by_name(record: Json, says: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=f"d\\.jsonl:1: .*({says})"):
        one(tmp_path, record)


def test_keys_may_be_named_as_ignored(tmp_path: Path) -> None:
    record = talk(note="read me", tools=["f"], system="S")
    record["conversations"][0]["name"] = "me"
    sample = one(tmp_path, record, ignored=("note", "tools", "system", "name"))
    assert spelt(sample) == QA


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"image": "a.png", "image": "b.png", "conversations": []}')
    with pytest.raises(SampleError, match=r"d\.jsonl:1: not JSON: an object has the key 'image' twice"):
        LlavaJson(str(tmp_path / "d.jsonl")).build()[0]


@pytest.mark.parametrize(
    ("turn", "weight"),
    [
        ({"weight": 0}, 0.0),
        ({"weight": 0.25}, 0.25),
        ({"weight": 1}, 1.0),
        ({"weight": None}, 1.0),
        ({"loss": False}, 0.0),
        ({"loss": True}, 1.0),
        ({"train": False}, 0.0),
    ],
)
def test_an_answer_may_have_a_weight(turn: Json, weight: float, tmp_path: Path, processor: Processor) -> None:
    record = said(("user", "Q"), ("assistant", "First"), ("user", "Q"), ("assistant", "A"))
    record["messages"][1] |= turn
    sample = one(tmp_path, record)
    mask = processor.encode(sample.messages).loss_mask
    assert mask.sum() == weight * len("First.") + len("A.")
    assert set(mask.tolist()) <= {0.0, weight, 1.0}


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"weight": -1}, "weight is -1, expected 0"),
        ({"weight": True}, "weight is True"),
        ({"weight": "0"}, "weight is '0'"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": 10**400}, "weight is 1000"),
        ({"loss": 0.5}, "loss is 0.5, expected true or false"),
        ({"loss": False, "weight": 0}, "a turn has 'weight' and 'loss'"),
        ({"training": False}, "'training' of a turn by 'assistant' is not read"),
        ({"loss_scale": 0.5}, "'loss_scale' of a turn by 'assistant' is not read"),
    ],
)
def test_weights_that_cannot_be(turn: Json, says: str, tmp_path: Path) -> None:
    record = said(*QA)
    record["messages"][1] |= turn
    with pytest.raises(SampleError, match=says):
        one(tmp_path, record)


def test_only_answers_are_weighed(tmp_path: Path) -> None:
    record = said(*QA)
    record["messages"][0]["weight"] = 1
    with pytest.raises(SampleError, match="weight of a user turn is 1: only answers are learned"):
        one(tmp_path, record)
    record["messages"][0]["weight"] = 0
    record["messages"][1]["weight"] = 0
    with pytest.raises(EmptyAnswer, match="every answer has the weight 0"):
        check_answers(one(tmp_path, record), "x")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"answers": [None]}, "answers.0 is None, expected a text or a number"),
        ({"answers": [["n"]]}, r"answers.0 is \['n'\]"),
        ({"answers": ["a", True]}, "answers.1 is True"),
        ({"answers": [{"answer": "a"}]}, "answers.0 is {"),
        ({"answers": {"a": 1}}, "answers is {'a': 1}, expected a list of texts"),
        ({"answer": [None]}, "answer.0 is None"),
        ({"answers": ["a"], "answer": "b"}, "'answer' is not one of 'answers'"),
        ({"metric": "exactmatch"}, "metric is 'exactmatch', expected one of exact_match, relaxed_accuracy, anls"),
        ({"metric": ["anls"]}, r"metric is \['anls'\]"),
        ({"evidence": [1]}, r"evidence is \[1\], expected four numbers"),
        ({"evidence": "abc"}, "evidence is 'abc'"),
        ({"evidence": [0, 0, float("inf"), 1]}, "evidence is"),
        ({"evidence": [9, 0, 1, 1]}, "with x1 <= x2"),
        ({"question": ["Q"]}, r"question is \['Q'\]"),
        ({"question": None}, "no question: the record has the keys 'question', 'answers'"),
        ({"image": ""}, "a picture is ''"),
        ({"system": 7}, "system is 7"),
        ({"conversations": [1]}, "'conversations' of the record is not read"),
        ({"choices": ["a", "b"]}, "'choices' of the record is not read: put it into the question"),
    ],
)
def test_questions_that_cannot_be(record: Json, says: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=f"d\\.jsonl:1: .*{says}"):
        one(tmp_path, {"question": "Q", "answers": ["A"], **record}, QaJsonl)


def test_questions_with_a_system_message_and_numbers(tmp_path: Path) -> None:
    sample = one(tmp_path, {"question": "Q", "answers": [4, 0.5, "A"], "system": "S", "answer": 4}, QaJsonl)
    assert sample.answers == ("4", "0.5", "A")
    assert spelt(sample) == [("system", "S"), ("user", "Q"), ("assistant", "4")]


def test_pictures_go_where_a_question_has_them(tmp_path: Path) -> None:
    record = {"question": "<image>\nis it <image>?", "answer": "A", "images": ["a.png", "b.png"], "answer_id": 3}
    assert spelt(one(tmp_path, record, QaJsonl)) == [("user", "[a.png]is it[b.png]?"), ("assistant", "A")]
    plain = {"question": "What is <image> in HTML?", "answer": "A"}
    assert spelt(one(tmp_path, plain, QaJsonl)) == [("user", "What is <image> in HTML?"), ("assistant", "A")]


def test_metrics_are_those_that_are_computed() -> None:
    assert set(METRICS) == set(metrics.METRICS)
    for kind in (QaJsonl,):
        with pytest.raises(ConfigError, match="metric is 'bleu', expected one of"):
            kind(metric="bleu")


def test_every_question_file_beside_the_checkout_is_read(shared_data: Path) -> None:
    files = sorted(shared_data.glob("*/*qa.jsonl"))
    assert files
    for path in files:
        # Metrics that are not computed here, names of the boxes, choices that no question asks for.
        source = QaJsonl(str(path), ignored=("metric", "label", "choices")).build()
        for index in range(len(source)):
            assert source[index].question
    for path in ("single_images.json", "video.json"):
        source = LlavaJson(str(shared_data / "qwen_demo" / path)).build()
        assert len(source)


NAMES = (
    "id image images video videos fps system conversations messages texts instruction input output history question "
    "answers answer metric evidence from value role content type text image_url path url weight loss"
)
KEYS = st.sampled_from(NAMES.split())
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<image>", "\0", PNG]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | KEYS, inner, max_size=3),
    max_leaves=8,
)
FULL: Json = {
    "id": "a",
    "image": "a.png",
    "video": ["a.png"],
    "fps": 1.0,
    "system": "S",
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image><video>"}]},
        {"role": "assistant", "content": "A", "weight": 0.5},
    ],
}
FULL_QUESTION: Json = {"id": 1, "question": "Q", "answers": ["A"], "metric": "anls", "evidence": [0, 0, 1, 1]}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a record, as keys and indices from the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def with_value(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = record.copy()
    copy[path[0]] = with_value(record[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize(("kind", "whole"), [(LlavaJson, FULL), (QaJsonl, FULL_QUESTION)], ids=["llava", "qa"])
def test_any_value_anywhere_is_read_or_refused(
    kind: type, whole: Json, processor: Processor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.png").write_bytes(png(0))
    assert one(folder, whole, kind)

    @given(st.sampled_from(places(whole)), ANY | st.dictionaries(KEYS, ANY))
    def check(path: tuple[Any, ...], value: Any) -> None:
        try:
            sample = one(folder, with_value(whole, path, value), kind)
            check_answers(sample, "x")
            processor.encode(sample.messages)
        except SampleError as error:
            assert len(str(error)) < 2000

    check()


@pytest.mark.parametrize(("kind", "whole"), [(LlavaJson, FULL), (QaJsonl, FULL_QUESTION)], ids=["llava", "qa"])
def test_a_text_is_in_the_sample_or_refused(kind: type, whole: Json, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Wherever a text is put under whatever name, it does not vanish; names of metadata alone let it pass."""
    folder = tmp_path_factory.mktemp("unread")
    objects = [path for path in places(whole) if isinstance(at(whole, path), dict)]

    @given(st.sampled_from(objects), KEYS | st.sampled_from(sorted(CONTENT)) | st.text(min_size=1, max_size=9))
    def check(path: tuple[Any, ...], key: str) -> None:
        assume(key not in METADATA | ANNOTATIONS)
        try:
            sample = one(folder, with_value(whole, path, {**at(whole, path), key: "Unseen"}), kind)
        except SampleError:
            return
        assert "Unseen" in repr(sample)

    check()


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """What stands at a place of a record."""
    for key in path:
        value = value[key]
    return value


def test_one_bad_record_ends_no_run(qa_folder: Path, processor: Processor) -> None:
    bad = [
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"question": "Q", "answers": ["A"], "evidence": [1]}',
        "\xff",
        "null",
        "{",
        "7",
    ]
    (qa_folder / "qa.jsonl").open("a").write("".join(f"{line}\n" for line in bad))
    config = DataConfig((QaJsonl(str(qa_folder / "qa.jsonl")),), rows=17, tokens=192, patches=64, prefetch=0)
    pipeline = Pipeline(config, processor)
    pipeline.rows(0, 0, 17)
    assert pipeline.skipped["bad record"] >= len(bad)


def test_a_list_with_a_bad_record_is_read_but_for_it(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([talk(), 7, talk(note="x")]))
    source = LlavaJson(str(tmp_path / "d.json")).build()
    assert spelt(source[0]) == QA
    for index, says in ((1, "int, expected an object"), (2, "'note'")):
        with pytest.raises(SampleError, match=rf"d\.json\[{index}\]: .*{says}"):
            source[index]
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"deep\.json: not JSON: it is nested too deeply"):
        LlavaJson(str(tmp_path / "deep.json")).build()
