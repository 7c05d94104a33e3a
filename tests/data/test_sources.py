"""Sources: records of files as conversations, by index."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.data.sources import HfParquet, LlavaJson, QaJsonl
from rave_jax.data.sources.records import conversation
from tests.data.pictures import noise

LLAVA = [
    {
        "id": "a",
        "image": "one.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {
        "id": "b",
        "image": ["one.png", "two.png"],
        "conversations": [
            {"from": "system", "value": "Look."},
            {"from": "human", "value": "Is <image> like <image> ?"},
            {"from": "gpt", "value": "No."},
        ],
    },
    {"id": "c", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    {
        "id": "d",
        "image": "one.png",
        "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}],
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one.png", "two.png"):
        Image.fromarray(noise(20, 30)).save(tmp_path / name)
    (tmp_path / "talk.json").write_text(json.dumps(LLAVA))
    (tmp_path / "talk.jsonl").write_text("\n\n".join(json.dumps(record) for record in LLAVA) + "\n{broken\n")
    return tmp_path


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_llava(name: str, folder: Path, processor: Processor) -> None:
    source = LlavaJson(str(folder / name)).build()
    assert source.name == "talk"
    first, second, third = source[0], source[1], source[2]
    one = {"type": "image", "image": str(folder / "one.png")}
    assert first.messages[0] == {"role": "user", "content": [one, {"type": "text", "text": "What is this?"}]}
    assert [m["role"] for m in first.messages] == ["user", "assistant", "user", "assistant"]
    assert first.answers == ("Yes.",)
    assert first.question == "Sure?"
    assert len(first.prompt) == 3
    kinds = [part["type"] for part in second.messages[1]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert [Path(image).name for image in second.images] == ["one.png", "two.png"]
    assert third.messages[0]["content"] == "Hello"
    for sample in (first, second, third):
        assert processor.encode(sample.messages).loss_mask.sum() > 0
    with pytest.raises(SampleError, match=rf"{name}.*a placeholder <image> without its image"):
        source[3]
    if name.endswith("jsonl"):
        assert len(source) == 5
        with pytest.raises(SampleError, match=r"talk\.jsonl:8: not JSON"):
            source[4]


def test_a_list_of_frames(tmp_path: Path) -> None:
    record = {
        "video": ["f0.png", "f1.png"],
        "fps": 2.0,
        "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "Rain."}],
    }
    (tmp_path / "v.json").write_text(json.dumps([record]))
    part = LlavaJson(str(tmp_path / "v.json")).build()[0].messages[0]["content"][0]
    assert part["video"] == [str(tmp_path / "f0.png"), str(tmp_path / "f1.png")]
    assert part["fps"] == 2.0


def test_a_folder_of_frames(shared_data: Path) -> None:
    source = QaJsonl(str(shared_data / "video_mini/qa.jsonl")).build()
    video, text = source[0].messages[0]["content"]
    assert [Path(frame).name for frame in video["video"]] == [f"frame_{n:02}.jpg" for n in range(16)]
    assert text["text"].startswith("Can you describe")


def test_a_video_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text('{"question": "Q", "answers": ["A"], "video": "clip.mp4"}')
    with pytest.raises(SampleError, match=r"qa\.jsonl:1: .*clip\.mp4: a video is a list of frames or a folder"):
        QaJsonl(str(tmp_path / "qa.jsonl")).build()[0]


def test_threads_read_the_same_lines(folder: Path) -> None:
    source = LlavaJson(str(folder / "talk.jsonl")).build()
    with ThreadPoolExecutor(4) as pool:
        assert [s.id for s in pool.map(source.__getitem__, [0, 1, 2] * 50)] == ["a", "b", "c"] * 50


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([{"from": "robot", "value": "x"}], "a turn by 'robot'"),
        ([{"from": "gpt"}], "without a text"),
        ([{"role": "user", "content": "<image>"}, {"role": "user", "content": "<image>"}], "without its image"),
        ([{"role": "user", "content": "<video>"}], "<video> without its video"),
        (["hello"], "a turn is str"),
        ([{"role": "user", "content": 7}], "expected a text or a list of parts"),
    ],
)
def test_turns_that_cannot_be(turns: list, says: str) -> None:
    with pytest.raises(SampleError, match=says):
        conversation(turns, [{"type": "image", "image": "a.png"}])


def test_pictures_without_a_placeholder_go_in_front() -> None:
    image = {"type": "image", "image": "a.png"}
    (message,) = conversation([{"role": "user", "content": "What?"}], [image, image])
    assert message["content"] == [image, image, {"type": "text", "text": "What?"}]
    with pytest.raises(SampleError, match="2 pictures for 1 placeholders"):
        conversation([{"role": "user", "content": "<image>What?"}], [image, image])


def test_missing_files_are_named(tmp_path: Path) -> None:
    for config in (LlavaJson("nowhere.json"), QaJsonl("nowhere.jsonl"), HfParquet("nowhere.parquet")):
        with pytest.raises(ConfigError, match="nowhere"):
            config.build()
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected a list"):
        LlavaJson(str(tmp_path / "object.json")).build()


def test_questions(qa_folder: Path) -> None:
    source = QaJsonl(str(qa_folder / "qa.jsonl"), suffix=" Be brief.").build()
    sample = source[4]
    assert (sample.id, sample.answers, sample.metric, sample.template) == ("q4", ("4",), "exact_match", "Which?")
    assert sample.question == "Which? Be brief."
    assert sample.source == qa_folder.name


def test_names_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text(
        '{"question": "Q", "image": 7}\n{"question": 7}\n{"question": "Q", "answers": 7}\n[]\n'
    )
    source = QaJsonl(str(tmp_path / "qa.jsonl")).build()
    for index, says in enumerate(("pictures are 7", "question is 7", "answers is 7", "list, expected an object")):
        with pytest.raises(SampleError, match=rf"qa\.jsonl:{index + 1}: {says}"):
            source[index]


def test_real_questions(shared_data: Path) -> None:
    source = QaJsonl(str(shared_data / "chartqa_mini/qa.jsonl")).build()
    assert source.name == "chartqa_mini"
    assert all(Path(source[i].images[0]).is_file() for i in range(len(source)))
    assert {source[i].metric for i in range(len(source))} == {"relaxed_accuracy"}


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(20, 30, seed=seed)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, columns: dict, rows: int = 3) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return str(path)


def test_parquet_with_questions(tmp_path: Path, processor: Processor) -> None:
    for part in range(2):
        images = [{"bytes": png(n), "path": f"{n}.png"} for n in range(7)]
        answers = [[f"{part}{n}", "other"] for n in range(7)]
        write(
            tmp_path / f"{part}.parquet",
            {"image": images, "question": ["Q?"] * 7, "answers": answers, "extra": [1] * 7},
        )
    source = HfParquet(str(tmp_path), cached_groups=1, metric="anls").build()
    assert len(source) == 14
    for index in (13, 0, 8, 6, 7, 3):
        sample = source[index]
        assert sample.answers == (f"{index // 7}{index % 7}", "other")
        assert sample.images == (png(index % 7),)
        assert sample.metric == "anls"
        assert processor.encode(sample.messages).loss_mask.sum() == len(sample.answers[0]) + 1
    with pytest.raises(IndexError):
        source[14]


def test_parquet_with_conversations(tmp_path: Path) -> None:
    images = [[{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}]] * 2
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "and"}]},
        {"role": "user", "content": [{"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
    ]
    path = write(tmp_path / "m.parquet", {"images": images, "messages": [messages] * 2})
    sample = HfParquet(path).build()[1]
    assert [m["role"] for m in sample.messages] == ["user", "user", "assistant"]
    assert sample.images == (png(0), png(1))
    assert sample.answers == ("ok",)
    texts = [[{"user": "Q1", "assistant": "A1"}, {"user": "Q2", "assistant": "A2"}]] * 2
    path = write(tmp_path / "t.parquet", {"images": images, "texts": texts})
    sample = HfParquet(path).build()[0]
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "image", "text"]
    assert (sample.question, sample.answers) == ("Q2", ("A2",))


def test_a_broken_picture_in_parquet_is_named(tmp_path: Path, processor: Processor) -> None:
    path = write(tmp_path / "b.parquet", {"image": [png(0), png(1)[:60]], "question": ["Q"] * 2, "answer": ["A"] * 2})
    sample = HfParquet(path).build()[1]
    with pytest.raises(SampleError, match=r"b\.parquet:1 image 0"):
        processor.encode(sample.messages)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", {"picture": [png(0)], "question": ["Q"]})
    with pytest.raises(ConfigError, match=r"columns \['picture', 'question'\]"):
        HfParquet(path).build()
    with pytest.raises(ConfigError, match="no column 'images'"):
        HfParquet(path, image_column="images").build()
    (tmp_path / "d.parquet").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"d\.parquet"):
        HfParquet(str(tmp_path / "d.parquet")).build()
