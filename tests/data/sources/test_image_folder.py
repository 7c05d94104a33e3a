"""Folders of pictures: with metadata beside them, or a folder for each class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rave_jax.config import ConfigError
from rave_jax.data.images import read_image
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError, SampleError
from rave_jax.data.sources import FieldIs, ImageFolder
from tests.data.test_sources import png


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def test_folders_of_classes(tmp_path: Path, processor: Processor) -> None:
    pictures(tmp_path, "dog/b.png", "cat/a.png", "cat/c.JPG", "big cat/x/d.png")
    (tmp_path / "cat/notes.txt").write_text("not a picture")
    source = ImageFolder(str(tmp_path), question="Which animal?").build()
    samples = [source[n] for n in range(len(source))]
    assert [s.id for s in samples] == ["big cat/x/d.png", "cat/a.png", "cat/c.JPG", "dog/b.png"]
    assert [s.answers for s in samples] == [("x",), ("cat",), ("cat",), ("dog",)]
    assert {s.question for s in samples} == {"Which animal?"}
    assert [part.length for part in source.parts] == [1, 2, 1]
    assert processor.encode(samples[0].messages).loss_mask.sum() > 0
    before = source.parts
    pictures(tmp_path, "dog/z.png")
    after = ImageFolder(str(tmp_path), question="Which animal?").build()
    assert after.parts[:2] == before[:2] and after.fingerprint != source.fingerprint


def test_a_table_in_lines_names_the_pictures_of_its_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "train/1.png", "train/2.png", "more/3.png")
    rows = [
        {"file_name": "1.png", "text": "One."},
        {"file_name": "2.png", "question": "How many?", "answer": 2},
        {"file_names": ["1.png", "2.png"], "caption": "Both."},
        {"text": "none"},
        {"file_name": "gone.png", "text": "Gone."},
    ]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "more/metadata.jsonl").write_text('{"file_name": "3.png", "text": "Three."}\n')
    source = ImageFolder(str(tmp_path), question="Describe.").build()
    assert source.name == tmp_path.name and len(source) == 6
    samples = [source[n] for n in (0, 1, 2, 3)]
    assert [s.answers for s in samples] == [("Three.",), ("One.",), ("2",), ("Both.",)]
    assert samples[3].images == (str(tmp_path / "train/1.png"), str(tmp_path / "train/2.png"))
    with pytest.raises(SampleError, match=r"train/metadata\.jsonl:4: no file_name"):
        source[4]
    with pytest.raises(ImageError, match=r"train/gone\.png: No such file"):
        read_image(source[5].images[0])


def test_a_table_of_values(tmp_path: Path) -> None:
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text,kind\n1.png,"One,\ntwo.",a\n\n2.png,Two.,b\n')
    source = ImageFolder(str(tmp_path), where=(FieldIs("kind", ("b",), keep=False),)).build()
    assert [source[n].answers for n in range(len(source))] == [("One,\ntwo.",)]
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a,b\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv:2: 3 values, expected 2"):
        ImageFolder(str(tmp_path)).build()


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    for path, says in (
        ("", "path is empty"),
        (str(tmp_path / "no"), "no folder with files"),
        (str(tmp_path), "no folder"),
    ):
        with pytest.raises(ConfigError, match=says):
            ImageFolder(path).build()
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"it holds no metadata\.jsonl and no metadata\.csv, and no pictures"):
        ImageFolder(str(tmp_path)).build()
    with pytest.raises(ConfigError, match="no folder with files there"):
        ImageFolder(str(tmp_path / "x.txt")).build()
    pictures(tmp_path, "cat/a.png")
    with pytest.raises(ConfigError, match=r"question is '', expected a text: .* the class is the answer"):
        ImageFolder(str(tmp_path)).build()
    pictures(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=r"a\.png: without metadata\.jsonl or metadata\.csv, pictures lie in folders"):
        ImageFolder(str(tmp_path), question="Q").build()


def test_tables_that_say_something_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n1.png,a,b\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv:1: two columns have the name 'text'"):
        ImageFolder(str(tmp_path)).build()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a"}\n')
    with pytest.raises(ConfigError, match=r"it holds metadata\.jsonl and metadata\.csv: move one of them"):
        ImageFolder(str(tmp_path)).build()


def test_what_programs_leave_behind_is_no_class(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/1.png", "cat/._1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png")
    source = ImageFolder(str(tmp_path), question="Q").build()
    assert [source[n].answers for n in range(len(source))] == [("cat",)]
