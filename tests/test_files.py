"""Files that a user names: regular ones are read, whatever could be waited on for ever is refused at once by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rave_jax import files
from rave_jax.files import NotAFile, check_folder, open_regular, read_text


def test_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("é")
    (tmp_path / "link").symlink_to("a")
    assert read_text(tmp_path / "link") == "é" and open_regular(tmp_path / "a").seekable()
    check_folder(tmp_path, ("*",))


def test_whatever_could_be_waited_on_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "socket"))
    found = {"pipe": "a named pipe", "link": "a named pipe", "socket": "a socket", ".": "a directory"}
    found |= {"pointer": "git lfs pull", "/dev/null": "a device"}
    for name, kind in found.items():
        with pytest.raises(NotAFile) as error:
            open_regular(tmp_path / name)
        assert kind in (error.value.strerror or "") and error.value.filename == str(tmp_path / name)
    with pytest.raises(NotAFile, match="pipe"):
        check_folder(tmp_path, ("p*",))
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nowhere")


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    modes = iter([os.stat(tmp_path / "file").st_mode, os.stat(tmp_path / "pipe").st_mode])
    check = files.check_regular
    monkeypatch.setattr(files, "check_regular", lambda path, mode: check(path, next(modes)))
    with pytest.raises(NotAFile, match="a named pipe"):
        open_regular(tmp_path / "pipe")
