"""Sources: records of files as conversations, by index."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError, VideoError
from rave_jax.data.sources import HfParquet, LlavaJson, QaJsonl, files
from rave_jax.data.sources.conversation import conversation
from rave_jax.data.sources.turns import turns_of
from tests.data.films import film
from tests.data.pictures import noise


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(20, 30, seed=seed)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, columns: dict, rows: int = 3) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return str(path)


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
    with pytest.raises(SampleError, match=rf"{name}.*more placeholders <image> than images"):
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


def test_video_files(tmp_path: Path, processor: Processor) -> None:
    """A path, bytes in a table, several of them; a file that is not there is found when it is read."""
    film(tmp_path / "clip.mp4", 4)
    (tmp_path / "qa.jsonl").write_text(
        '{"question": "Q", "answers": ["A"], "video": "clip.mp4"}\n'
        '{"question": "Q", "answers": ["A"], "video": "gone.mp4"}\n'
    )
    source = QaJsonl(str(tmp_path / "qa.jsonl")).build()
    assert source[0].messages[0]["content"][0]["video"] == str(tmp_path / "clip.mp4")
    assert processor.encode(source[0].messages).patches.length
    with pytest.raises(VideoError, match=r"gone\.mp4: No such file"):
        processor.encode(source[1].messages)
    data = (tmp_path / "clip.mp4").read_bytes()
    rows = [{"question": "Q", "answers": ["A"], "videos": [{"bytes": data, "path": None}] * 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "v.parquet")
    table = HfParquet(str(tmp_path / "v.parquet")).build()
    parts = table[0].messages[0]["content"][:2]
    assert [part["video"] for part in parts] == [data, data]
    assert [part["name"].split()[-2:] for part in parts] == [["video", "0"], ["video", "1"]]
    said = [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}]}, {"role": "assistant", "content": "A"}]
    (tmp_path / "m.json").write_text(json.dumps([{"messages": said}]))
    (part,) = LlavaJson(str(tmp_path / "m.json")).build()[0].messages[0]["content"]
    assert part == {"type": "video", "video": str(tmp_path / "clip.mp4"), "name": str(tmp_path / "clip.mp4")}


def test_threads_read_the_same_lines(folder: Path) -> None:
    source = LlavaJson(str(folder / "talk.jsonl")).build()
    with ThreadPoolExecutor(4) as pool:
        assert [s.id for s in pool.map(source.__getitem__, [0, 1, 2] * 50)] == ["a", "b", "c"] * 50


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([{"from": "robot", "value": "x"}], "the role of a turn is 'robot'"),
        ([{"from": "gpt"}], "has no text"),
        ([{"role": "user", "content": "<image>"}, {"role": "user", "content": "<image>"}], "more placeholders <image>"),
        ([{"role": "user", "content": "<video>"}], "placeholders <video> than videos"),
        (["hello"], "a turn is str"),
        ([{"role": "user", "content": 7}], "expected a text or a list of parts"),
    ],
)
def test_turns_that_cannot_be(turns: list, says: str) -> None:
    with pytest.raises(SampleError, match=says):
        conversation(turns_of({"messages": turns}), [{"type": "image", "image": "a.png"}], Path())


def test_pictures_without_a_placeholder_go_in_front() -> None:
    image = {"type": "image", "image": "a.png"}
    (message,) = conversation(turns_of({"messages": [{"role": "user", "content": "What?"}]}), [image, image], Path())
    assert message["content"] == [image, image, {"type": "text", "text": "What?"}]
    with pytest.raises(SampleError, match="2 pictures, but its texts have 1 placeholders"):
        turns = turns_of({"messages": [{"role": "user", "content": "<image>What?"}]})
        conversation(turns, [image, image], Path())


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


QUESTION = {"question": ["Q"], "answer": ["A"]}


@pytest.mark.parametrize(
    ("columns", "images"),
    [
        ({"picture": [{"bytes": png(0), "path": None}]}, [png(0)]),
        ({"photo": [png(0)]}, [png(0)]),
        ({"pages": [[{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}]]}, [png(0), png(1)]),
        ({"scans": [[png(0), png(1)]]}, [png(0), png(1)]),
        ({"photo": pa.array([png(0)]).dictionary_encode()}, [png(0)]),
        ({"photo": pa.array([png(0)], pa.binary_view())}, [png(0)]),
        ({"photo": [png(0)], "md5": [b"0123456789abcdef"], "file_hash": [b"0123"]}, [png(0)]),
        ({"image": [png(0)], "image_id": [7], "url": ["http://here"]}, [png(0)]),
    ],
)
def test_parquet_finds_its_one_column_of_pictures(columns: dict, images: list[bytes], tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", {**columns, **QUESTION})
    assert HfParquet(path).build()[0].images == tuple(images)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"left": [png(0)], "right": [png(1)]}, "the columns left, right hold bytes: name one as image_column"),
        ({"image": [png(0)], "map": [png(1)]}, "the column 'map' holds bytes and is not read"),
        (
            {"image": [png(0)], "images": [[png(1)]]},
            "the column image is not read: another column is read in its place",
        ),
        ({"image": [png(0)], "media": [{"left": {"bytes": png(0)}}]}, "the column 'media' holds bytes"),
        ({"audio": [{"bytes": b"x", "path": None}]}, "'audio' of a row is not read: audio is not supported"),
        ({"image_path": ["a.png"]}, "'image_path' of a row is not read: a picture belongs under 'image'"),
        ({"sytem": ["S"]}, "'sytem' of a row is not read; did you mean 'system'"),
        ({"tools": ['[{"name": "f"}]']}, "tool calls are not supported"),
        ({"choices": [["a", "b"]]}, "put it into the question"),
    ],
)
def test_parquet_refuses_columns_that_would_pass_unread(columns: dict, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", {**columns, **QUESTION})
    with pytest.raises(ConfigError, match=rf"p\.parquet: .*{says}"):
        HfParquet(path).build()
    source = HfParquet(path, image_column="image" if "image" in columns else "", ignored=(*columns, "x")).build()
    assert source[0].answers == ("A",)


def test_files_of_one_source_have_the_same_columns_to_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**QUESTION, "id": ["x"], "system": ["S"], "tools": [""]})
    write(tmp_path / "b.parquet", {**QUESTION, "note": ["n"]})
    source = HfParquet(str(tmp_path)).build()
    assert [len(source[index].messages) for index in range(2)] == [3, 2]
    write(tmp_path / "c.parquet", {**QUESTION, "image": [png(0)]})
    with pytest.raises(ConfigError, match=r"c\.parquet: the column 'image' is not in .*a\.parquet"):
        HfParquet(str(tmp_path)).build()
    pq.write_table(pa.table([pa.array(["A"])] * 3, names=["question", "answer", "question"]), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"d\.parquet: 2 columns have the name 'question'"):
        HfParquet(str(tmp_path / "d.parquet")).build()


def test_a_column_that_is_named_stands_for_its_kind(tmp_path: Path) -> None:
    columns = {"answers": [["yes", "no"]], "best": ["yes"], "image": [png(0)], "crop": [png(1)], "question": ["Q"]}
    path = write(tmp_path / "p.parquet", columns)
    sample = HfParquet(path, answer_column="best", image_column="crop").build()[0]
    assert (sample.answers, sample.images) == (("yes",), (png(1),))


@pytest.mark.parametrize(("answer", "text"), [(Decimal("1.50"), "1.50"), (date(2020, 1, 2), "2020-01-02")])
def test_answers_that_only_tables_have(answer: object, text: str, tmp_path: Path) -> None:
    assert HfParquet(write(tmp_path / "p.parquet", {"question": ["Q"], "answer": [answer]})).build()[0].answers == (
        text,
    )


def test_parquet_names_columns_that_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.parquet", {**QUESTION, "note": ["n"], "split": ["s"], "tools": [""], "more": ["m"]})
    HfParquet(path, ignored=("more",)).build()
    assert [r.getMessage().partition(": ")[2].partition(" (")[0] for r in caplog.records] == [
        "columns that are not read: note"
    ]


def test_parquet_reads_the_shapes_that_json_has(tmp_path: Path) -> None:
    columns = {"instruction": ["Q"], "input": ["I"], "output": ["A"], "system": ["S"], "images": [[png(0)]]}
    sample = HfParquet(write(tmp_path / "a.parquet", columns)).build()[0]
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant"]
    assert (sample.question, sample.answers, sample.images) == ("Q\nI", ("A",), (png(0),))
    parts = [{"type": "image", "image": {"bytes": png(1), "path": None}, "text": None}, {"type": "text", "text": "Q"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    sample = HfParquet(write(tmp_path / "b.parquet", {"messages": [turns]})).build()[0]
    assert (sample.question, sample.answers, sample.images) == ("Q", ("A",), (png(1),))
    columns = {"question": ["Q"], "label": [3], "id": [7], "system": ["S"]}
    sample = HfParquet(write(tmp_path / "c.parquet", columns)).build()[0]
    assert (sample.answers, sample.id, sample.messages[0]["content"]) == (("3",), "7", "S")


def test_the_number_of_a_class_is_read_as_its_name(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"question": ["Q"] * 3, "label": [1, 0, -1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "p.parquet")
    source = HfParquet(str(tmp_path / "p.parquet")).build()
    assert [source[index].answers for index in range(3)] == [("dog",), ("cat",), ()]


def test_a_row_that_python_cannot_hold_is_one_bad_record(tmp_path: Path) -> None:
    no_text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    for column in ("answer", "tools"):
        path = write(tmp_path / "p.parquet", {**QUESTION, column: no_text})
        with pytest.raises(SampleError, match=r"p\.parquet:0: 'utf-8' codec"):
            HfParquet(path).build()[0]


def test_rows_that_cannot_be(tmp_path: Path) -> None:
    answers = pa.array([["a"], [None], None])
    path = write(tmp_path / "p.parquet", {"question": ["Q", "Q", None], "answers": answers})
    source = HfParquet(path).build()
    assert source[0].answers == ("a",)
    for index, says in ((1, "answers.0 is None"), (2, "no question")):
        with pytest.raises(SampleError, match=rf"p\.parquet:{index}: {says}"):
            source[index]
    other = write(tmp_path / "q.parquet", {"question": ["Q"], "text": ["A"]})
    with pytest.raises(ConfigError, match=r"q\.parquet: no column 'answers', which .*p\.parquet has"):
        HfParquet(str(tmp_path)).build()
    assert other


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.parquet", None, "expected JSON, and this is a parquet file: HfParquet reads those"),
        ("d.json", None, "expected JSON, and this is a parquet file"),
        ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("d.json", b"\x1f\x8b\x08rest", "compressed by gzip"),
        ("d.jsonl", b"\x00\x01\x02", "binary data"),
        ("d.json", b'{"a": 1}\n{"a": 2}\n', "not JSON: Extra data.*JSON Lines, an object a line, belong in a file"),
        (
            "folder",
            None,
            "'.*folder' cannot be read: it is a directory; .*; expected a file of records",
        ),
        ("pipe", None, "'.*pipe' cannot be read: it is a named pipe"),
        ("n" * 300, None, "cannot be read: File name too long"),
        ("nul\0", None, "cannot be read: embedded null"),
    ],
)
def test_files_of_other_kinds_say_what_they_are(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name.startswith("d."):
        write(path, QUESTION)
    for kind in (LlavaJson, QaJsonl):
        with pytest.raises(ConfigError, match=says):
            kind(str(path)).build()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"question": "Q"}]', "expected parquet, and this is not a parquet file; LlavaJson and QaJsonl read JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer and not the file itself"),
        (b"PAR1 cut off", "the parquet file cannot be read"),
    ],
)
def test_what_is_no_parquet_says_so(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"p\.parquet.*: {says}"):
        HfParquet(str(tmp_path / "p.parquet")).build()


def test_a_fingerprint_is_of_the_records_and_their_order(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in LLAVA]

    def of(text: str, name: str) -> str:
        (tmp_path / name).write_text(text)
        return LlavaJson(str(tmp_path / name)).build().fingerprint

    plain = of("\n".join(lines), "a.jsonl")
    assert of("\n\n".join(lines) + "\n", "b.jsonl") == plain
    assert of("\n".join(reversed(lines)), "c.jsonl") != plain
    assert of(f"[{','.join(lines)}]", "a.json") != of(f"[{','.join(reversed(lines))}]", "b.json")
    prints = set()
    for name, ask in (("a", ["Q", "R"]), ("b", ["R", "Q"])):
        path = write(tmp_path / f"{name}.parquet", {"question": ask, "answer": ["A", "A"]})
        prints.add(HfParquet(path).build().fingerprint)
    assert len(prints) == 2


def test_a_fingerprint_of_large_files_reads_a_part_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 10)
    monkeypatch.setattr(files, "MOST_BLOCKS", 8)
    paths = [tmp_path / "a", tmp_path / "b"]
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    for path in paths:
        path.write_bytes(content)
    first = files.fingerprint_of_files(paths)
    assert files.fingerprint_of_files(paths) == first
    for changed in (content[::-1], content[500:] + content[:500], content[:-1], content[:-1] + b"?"):
        paths[1].write_bytes(changed)
        assert files.fingerprint_of_files(paths) != first
        assert files.fingerprint_of_files(paths[::-1]) != files.fingerprint_of_files(paths)
