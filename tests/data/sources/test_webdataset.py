"""WebDataset: samples of tar files by an index of their members."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError, UnreadKey
from rave_jax.data.sources import FieldIs, WebDataset, tar
from rave_jax.data.sources.webdataset import in_braces
from tests.data.films import film
from tests.data.test_sources import png

TALK = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}


def write(path: Path, members: dict[str, Any], kind: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else b""
            data = data or json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def captioned(count: int, start: int = 0) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for n in range(start, start + count):
        made |= {f"{n:04}.png": png(n), f"{n:04}.txt": f"caption {n}"}
    return made


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_are_members_of_one_key(kind: int, tmp_path: Path, processor: Processor) -> None:
    long = "f" * 60 + "/" + "n" * 90
    members = {
        "a/1.json": TALK,
        "a/1.png": png(1),
        "2.seg1.png": png(2),
        "2.seg2.PNG": png(3),
        "2.json": {"question": "Same?", "answers": ["no", "No"], "metric": "anls", "id": "two"},
        "3.jpg": png(4),
        "3.txt": "Three.",
        f"{long}.txt": "No picture.",
    }
    source = WebDataset(write(tmp_path / "s.tar", members, kind), question="Describe it.").build()
    samples = [source[n] for n in range(len(source))]
    assert [s.id for s in samples] == ["a/1", "two", "3", long]
    assert [s.images for s in samples] == [(png(1),), (png(2), png(3)), (png(4),), ()]
    assert [s.question for s in samples] == ["What?", "Same?", "Describe it.", "Describe it."]
    assert [s.answers for s in samples] == [("A cat.",), ("no", "No"), ("Three.",), ("No picture.",)]
    assert samples[1].metric == "anls"
    assert all(processor.encode(s.messages).loss_mask.sum() for s in samples)


def test_members_may_be_videos(tmp_path: Path, processor: Processor) -> None:
    clip = film(tmp_path / "a.mp4", 4).read_bytes()
    pair = {"question": "Q", "answer": "A"}
    members = {
        "1.mp4": clip,
        "1.txt": "A column moves.",
        "2.clip.mp4": clip,
        "2.png": png(1),
        "2.json": {**pair, "question": "<video><image>Q", "video": "clip.mp4"},
        "3.mp4": clip,
        "3.json": {**pair, "video": "other.mp4"},
    }
    source = WebDataset(write(tmp_path / "s.tar", members), question="What happens?").build()
    for index, kinds in ((0, ["video", "text"]), (1, ["video", "image", "text"])):
        parts = source[index].messages[0]["content"]
        assert [part["type"] for part in parts] == kinds
        assert parts[0]["video"] == clip
        assert processor.encode(source[index].messages).patches.length
    with pytest.raises(SampleError, match=r"the record names the videos \['other.mp4'\], and the members are"):
        source[2]


def test_json_may_name_the_pictures(tmp_path: Path) -> None:
    pair = {"question": "Q", "answer": "A"}
    members = {
        "1.left.png": png(1),
        "1.right.png": png(2),
        "1.json": {**pair, "images": ["right.png", "some/folder/1.left.png"]},
        "2.png": png(1),
        "2.json": {**pair, "image": "another.png"},
        "3.json": {**pair, "image": "beside.png"},
    }
    source = WebDataset(write(tmp_path / "s.tar", members)).build()
    assert source[0].images == (png(2), png(1))
    with pytest.raises(
        SampleError, match=r"s\.tar/2: the record names the pictures \['another.png'\], and the members"
    ):
        source[1]
    assert source[2].images == (str(tmp_path / "beside.png"),)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"1.png": b"x", "1.npy": b"abc", "1.txt": "t"}, "the key 'npy' of the record is not read"),
        ({"1.png": b"x"}, "no turns, no question and no caption"),
        ({"1.json": b"{", "1.png": b"x"}, "json is not JSON"),
        ({"1.json": b"[1]"}, "json holds list, expected an object"),
        ({"1.txt": b"\xff\xfe"}, "txt is not UTF-8"),
        ({"1.txt": "one", "1.caption": "two"}, "'caption' and 'txt' are different captions"),
    ],
)
def test_samples_that_cannot_be_used_are_named(members: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = WebDataset(write(tmp_path / "s.tar", members)).build()
    with pytest.raises(SampleError, match=rf"s\.tar/1: {says}"):
        source[0]


def test_extensions_may_be_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tar", {"1.png": png(1), "1.npy": b"abc", "1.txt": "t"})
    with pytest.raises(UnreadKey):
        WebDataset(path).build()[0]
    assert WebDataset(path, ignored=("npy",)).build()[0].answers == ("t",)


def test_several_files_by_folder_glob_and_braces(tmp_path: Path) -> None:
    for shard in range(3):
        write(tmp_path / f"s-{shard:02}.tar", captioned(2, 2 * shard))
    for path in ("", "s-*.tar", "s-{00..02}.tar", "s-{00,01,02}.tar"):
        source = WebDataset(str(tmp_path / path), question="Q").build()
        assert [source[n].answers[0] for n in range(6)] == [f"caption {n}" for n in range(6)]
        assert [part.length for part in source.parts] == [2, 2, 2]
    assert in_braces("a-{08..10}-{x,y}.tar")[::5] == ["a-08-x.tar", "a-10-y.tar"]
    with pytest.raises(ConfigError, match=r"s-03\.tar': no tar file there"):
        WebDataset(str(tmp_path / "s-{02..07}.tar")).build()
    with pytest.raises(ConfigError, match="from its least number to its largest"):
        WebDataset("s-{5..2}.tar").build()


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "between members", "no end mark"])
def test_of_a_truncated_tar_whole_samples_are_used(cut: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "s.tar", captioned(10))
    with tarfile.open(path) as file:
        members = file.getmembers()
    last = members[-2]
    size = {
        "in a picture": last.offset_data + 40,
        "in a header": last.offset + 100,
        "between members": members[-1].offset,
        "no end mark": members[-1].offset_data + 512,
    }[cut]
    Path(path).write_bytes(Path(path).read_bytes()[:size])
    source = WebDataset(path, question="Q").build()
    (line,) = [record.getMessage() for record in caplog.records]
    lack = ", the last of which may lack members"
    says = {
        "in a picture": "is cut off in the member '0009.png': 9 samples are whole and used and 1 is not",
        "in a header": f"is damaged or cut off at byte {last.offset:,}: 9 samples are used{lack}",
        "between members": f"has no end mark at byte {size:,}: 10 samples are used{lack}",
        "no end mark": f"has no end mark at byte {size:,}: 10 samples are used{lack}",
    }[cut]
    assert line == f"{path}: the tar file {says}"
    assert [source[n].answers[0] for n in range(9)] == [f"caption {n}" for n in range(9)]
    if cut == "in a picture":
        with pytest.raises(SampleError, match=r"s\.tar/0009: the tar file is cut off in the member '0009\.png'"):
            source[9]
    if cut == "between members":
        with pytest.raises(SampleError, match=r"s\.tar/0009: no turns, no question and no caption"):
            source[9]


def test_the_index_is_made_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "s.tar", captioned(3))
    first = WebDataset(path).build()
    scan = tar._scan
    monkeypatch.setattr(tar, "_scan", None)
    assert WebDataset(path).build().parts == first.parts
    monkeypatch.setattr(tar, "_scan", scan)
    write(tmp_path / "s.tar", captioned(4, 1))
    again = WebDataset(path).build()
    assert again.fingerprint != first.fingerprint and again[3].answers == ("caption 4",)
    with pytest.raises(SampleError, match=r"cannot be read: it has changed since it was opened"):
        first[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b\x08" + b"x" * 600, "expected a tar file, and this is compressed by gzip; unpack it first"),
        (b'{"a": 1}' * 100, "expected a tar file: "),
        (b"", "expected a tar file: "),
    ],
)
def test_what_is_no_tar_file_says_so(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"s\.tar: {says}"):
        WebDataset(str(tmp_path / "s.tar")).build()
    with pytest.raises(ConfigError, match="path is empty"):
        WebDataset().build()


def test_samples_are_chosen_by_fields_of_their_json(tmp_path: Path) -> None:
    members = {f"{n}.json": {"question": "Q", "answer": str(n), "language": "de" if n % 2 else "en"} for n in range(6)}
    path = write(tmp_path / "s.tar", members)
    source = WebDataset(path, where=(FieldIs("language", ("de",)),)).build()
    assert [source[n].answers[0] for n in range(len(source))] == ["1", "3", "5"]


def test_a_picture_that_stands_twice_is_not_dropped(tmp_path: Path) -> None:
    """As `tar --append` leaves it: two members of one name."""
    path = tmp_path / "s.tar"
    write(path, {"1.png": png(1), "1.txt": "t"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("1.png")
        member.size = len(png(2))
        tar.addfile(member, io.BytesIO(png(2)))
    with pytest.raises(SampleError, match=r"s\.tar/1: two members of the sample have the name '1\.png'"):
        WebDataset(str(path)).build()[0]
