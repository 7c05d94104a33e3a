"""Requests: nothing in them passes unread, pictures lie below one folder, and whatever JSON holds is one line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.inference import Request, Sampling
from rave_jax.tools.folder import PictureFolder
from rave_jax.tools.jsonl import read_lines
from rave_jax.tools.request import PART_KEYS, read_request, resolved
from tests.data.conftest import TEMPLATE, byte_tokenizer, tiny_settings

HERE = PictureFolder.of(Path("/pictures/mine"))


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = byte_tokenizer()
    return Processor(tokenizer, tiny_settings(tokenizer), TEMPLATE)


def user(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_pictures_in_every_form_become_one_form() -> None:
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "/pictures/mine/below/../a.png"},
        {"type": "image", "url": "file:///pictures/mine/a.png", "image": None},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": "a.png"},
    ]
    uri = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    video = {"type": "video", "video": ["a.png", "a.png"], "fps": 2}
    text = {"type": "text", "text": "What?"}
    message = {"role": "user", "content": [*parts, uri, video, text], "tool_calls": None, "name": ""}
    (found,) = resolved([message], HERE, "x: messages")
    file = "/pictures/mine/a.png"
    image = {"type": "image", "image": file}
    data = {"type": "image", "image": "data:image/png;base64,AAAA"}
    assert found == {"role": "user", "content": [image] * 5 + [data, video | {"video": [file, file]}, text]}


def test_a_video_is_a_file_in_every_form() -> None:
    parts = [{"type": "video", key: "a.mp4"} for key in ("video", "path", "url")]
    (found,) = resolved([{"role": "user", "content": parts}], HERE, "x: messages")
    assert found["content"] == [{"type": "video", "video": "/pictures/mine/a.mp4"}] * 3


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "x: messages: expected a JSON list of messages"),
        ([{"role": "user"}], "expected a JSON list of messages, each with 'role' and 'content'"),
        ([{"role": "user", "content": "a", "images": ["a.png"]}], "messages[0]: the key 'images' of a message is not"),
        ([{"role": "user", "content": "a", "contents": "b"}], "did you mean 'content'?"),
        ([{"role": "user", "content": None}], "messages[0].content is None, expected a text or a list of parts"),
        (user("words"), "messages[0].content[0] is 'words', expected a part"),
        (user({"type": "text", "text": "a"}, {"type": "audio"}), "content[1]: a part of type 'audio' is not read"),
        (user({"type": "image_ulr"}), "a part of type 'image_ulr' is not read; did you mean 'image_url'?"),
        (user({"type": ["image"]}), "a part of type ['image'] is not read; expected text, image, image_url, video"),
        (user({"text": "a"}), "a part of type None is not read"),
        (user({"type": "text", "text": 3}), "a text part's text is 3, expected a string"),
        (user({"type": "image", "image": "a", "max_pixels": 5}), "the key 'max_pixels' of a part of type 'image' is"),
        (user({"type": "image"}), "names a picture under none of its keys, expected it under one of 'image', 'path'"),
        (user({"type": "image", "image": "a", "url": "b"}), "names a picture under 'image' and 'url'"),
        (user({"type": "image_url", "image_url": {"url": 5}}), "a picture is 5, expected the path of a file"),
        (user({"type": "image", "image": ""}), "content[0]: the path of a picture is empty"),
        (user({"type": "image", "image": "https://a.org/b.png"}), "pictures are not downloaded; save it below /pictur"),
        (user({"type": "image", "image": "a\0b"}), "no file can have the path"),
        (user({"type": "image", "image": "\ud800"}), "no file can have the path"),
        (user({"type": "video", "video": 7}), "a video is 7, expected the path of a file or a data: URI, or a list of"),
        (user({"type": "video"}), "names a video under none of its keys, expected it under one of 'video', 'path'"),
        (user({"type": "video", "url": "http://b.org/c"}), "is a URL: videos are not downloaded; save it below"),
        (user({"type": "video", "video": "../a.mp4"}), "lies outside of /pictures/mine"),
        (user({"type": "video", "video": ["a", "http://b.org/c"]}), "content[0].video[1]: 'http://b.org/c' is a URL"),
    ],
)
def test_what_is_not_read_is_refused_by_its_place(messages: list, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(messages, HERE, "x: messages")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_pictures_lie_below_the_folder_whatever_the_path_looks_like(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "mine too"
    for folder in (mine, other):
        folder.mkdir()
        (folder / "a.png").touch()
    (mine / "link.png").symlink_to(other / "a.png")
    (mine / "around").symlink_to(other)
    (mine / "loop").symlink_to("loop")
    (tmp_path / "door").symlink_to(mine)
    folder = PictureFolder.of(mine)
    for path in ("a.png", "./a.png", str(mine / "a.png"), "../mine/a.png", str(tmp_path / "door" / "a.png")):
        assert folder.find(path) == str(mine / "a.png")
    outside = ["../mine too/a.png", str(other / "a.png"), "link.png", "around/a.png", "/etc/passwd", "..", "/"]
    for path in outside:
        with pytest.raises(ConfigError, match=r"lies outside of .*mine, the folder .* --image-dir FOLDER"):
            folder.find(path)
    wide = PictureFolder.of(mine, tmp_path)
    assert wide.find("link.png") == wide.find("../mine too/a.png") == str(other / "a.png")
    assert PictureFolder.of(tmp_path / "door").find("a.png") == str(mine / "a.png")
    for root, says in ((tmp_path / "nowhere", "no such folder"), (mine / "a.png", "not a folder")):
        with pytest.raises(ConfigError, match=f"--image-dir .*: {says}"):
            PictureFolder.of(mine, root)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 200_000, "not JSON: it is nested too deeply"),
        (b'[{"role": "user", "content": "a", "content": "b"}]', "has the key 'content' twice"),
        (b"", "not JSON"),
        (b"\xff", "not JSON: 'utf-8' codec"),
        (b'[{"role": "user", "content": "a"}', "not JSON"),
        (b"9" * 5000, "4300 digits"),
    ],
)
def test_a_file_that_is_no_request_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        read_request(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    [refused] = read_lines([content or b"x"], HERE, Sampling())
    assert isinstance(refused, SampleError) and (says in str(refused) or not content)


def test_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe: cannot be read: it is a named pipe, such as `<\(\.\.\.\)`"):
        read_request(tmp_path / "pipe")


SCALARS = (
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    1.5,
    "",
    "a.png",
    "a" * 10_000,
    "data:,",
    "http://a",
    "user",
    "\n",
    "\ud800",
)
NAMES = ("type", "text", "image", "path", "url", "image_url", "video", "fps", "role", "content", "zzz")
FIELDS = ("messages", "stop", "stop_ids", "temperature", "seed", "max_new_tokens", "zzz")


def anything(rng: random.Random, depth: int = 3) -> Any:
    """A value of JSON that may be near to a request."""
    kind = rng.randrange(6 if depth else 1)
    if kind == 1:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 2:
        return {rng.choice(NAMES): anything(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 3:
        return {"type": rng.choice([*PART_KEYS])} | {rng.choice(NAMES): anything(rng, 1) for _ in range(2)}
    if kind == 4:
        return {"role": rng.choice(["user", "assistant", 3]), "content": [anything(rng, depth - 1)]}
    if kind == 5 and rng.random() < 0.5:
        part = rng.choice([*PART_KEYS])
        return [{"type": part, part: anything(rng, 1)}]
    if kind == 5 and rng.random() < 0.2:
        return json.loads("[" * 500 + "]" * 500)
    return rng.choice(SCALARS)


@given(st.integers(0, 2**32))
def test_whatever_a_line_holds_it_is_a_request_or_one_line_of_error(processor: Processor, seed: int) -> None:
    rng = random.Random(seed)
    data: Any = {"messages": [{"role": "user", "content": anything(rng)}] + [anything(rng)] * rng.randrange(2)}
    data |= {rng.choice(FIELDS): anything(rng) for _ in range(2 * (rng.random() < 0.4))}
    [found] = read_lines([json.dumps(rng.choice([data] * 9 + [anything(rng)])).encode()], HERE, Sampling())
    if isinstance(found, Request):
        try:
            processor.encode(found.messages, add_generation_prompt=True, name=found.name)
        except SampleError as error:
            found = error
    if isinstance(found, SampleError):
        said = str(found)
        assert said.startswith("line 1: ") and "\n" not in said and len(said) < 3000
