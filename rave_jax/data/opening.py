"""What a picture or video is given as (path, URI, bytes, picture in memory); pictures opened by Pillow, no pixels
decoded yet."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import urllib.parse
from collections.abc import Generator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from rave_jax.data.places import scheme_of, stream
from rave_jax.data.sample import ImageError
from rave_jax.files import LFS_ADVICE, LFS_POINTER, open_regular

LONGEST_PATH = 4096
"""Bytes of the longest path that Linux takes."""
NO_PICTURES = (
    (LFS_POINTER, LFS_ADVICE),
    (b"<!doctype html", "a web page, as a failed download leaves it"),
    (b"<html", "a web page, as a failed download leaves it"),
    (b"<svg", "an SVG drawing; save it as PNG"),
    (b"%PDF", "a PDF; save its pages as pictures"),
)
"""How files start that are often taken for pictures, and what they are."""


def describe(source: Any, name: str = "") -> str:
    """What an error calls a picture: its given name, its path, or its kind."""
    if name:
        return name
    if not isinstance(source, (str, os.PathLike)):
        return f"{type(source).__name__} in memory"
    text = os.fsdecode(source)
    if len(text) > LONGEST_PATH or is_data(text):
        return f"{text[:60]!r}... of {len(text)} characters"
    return text if text.isprintable() else repr(text)


def reason(error: Exception) -> str:
    """What an error of the system, of Pillow or of ours says, without the path that stands before it."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def is_encoded(source: Any) -> bool:
    """Is it a picture in a file format?"""
    return isinstance(source, (bytes, str, os.PathLike))


@contextlib.contextmanager
def opened(source: Any) -> Generator[Image.Image]:
    """The picture, of which only the header is read; its file is closed at the end.

    Raises:
        ImageError: what is given is of no known kind, is an address on the net, or its bytes are not a picture.
        OSError: the file cannot be opened, or is no regular file.
    """
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, np.ndarray):
        yield _of_array(source)
    elif is_encoded(source):
        with open_encoded(source) as file:
            yield _identified(file)
    else:
        raise ImageError(f"{type(source).__name__}: expected a path, bytes, a PIL image or a uint8 array")


def _of_array(pixels: np.ndarray) -> Image.Image:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(f"array of {pixels.dtype} {pixels.shape}: expected uint8 [H,W] or [H,W,1|3|4]")
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)


def open_encoded(source: Any, what: str = "picture") -> BinaryIO:
    """The bytes of a picture or video file, given as path, file: or data: URI, or bytes.

    Raises:
        ImageError: an address on the net, or a text that is no path.
        OSError: the file cannot be opened, or is no regular file.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    text = os.fsdecode(source)
    if is_data(text):
        return io.BytesIO(from_data_uri(text))
    path = text.removeprefix("file://")
    if not path.strip():
        raise ImageError(f"the path of a {what} is empty")
    if scheme_of(path):
        return stream(path)
    if is_address(path):
        raise ImageError(f"a URL: {what}s are not downloaded; save the {what} and give the path of the file")
    if len(path) > LONGEST_PATH:
        kind = "video/mp4" if what == "video" else "image/png"
        raise ImageError(f"too long for a path; write base64 of a {what} as data:{kind};base64,...")
    return open_regular(path)


def is_address(text: str) -> bool:
    """Is it an address such as https://... and no path?"""
    scheme, found, _ = text[:20].partition("://")
    return bool(found) and scheme.isalnum()


def is_data(text: str) -> bool:
    """Is it a data: URI?"""
    return text[:5].lower() == "data:"


def from_data_uri(uri: str) -> bytes:
    """The bytes in a data: URI (RFC 2397).

    Raises:
        ImageError: it holds none, or broken base64.
    """
    header, comma, data = uri.partition(",")
    if not comma:
        raise ImageError("a data URI without a comma; expected data:image/png;base64,...")
    found = urllib.parse.unquote_to_bytes(data)
    if header.lower().endswith(";base64"):
        try:
            found = base64.b64decode(b"".join(found.split()), validate=True)
        except binascii.Error as error:
            raise ImageError(f"the base64 of its data URI is broken: {error}") from error
    if not found:
        raise ImageError("a data URI that holds no bytes")
    return found


def _identified(file: BinaryIO) -> Image.Image:
    start = file.read(256)
    file.seek(0)
    if not start:
        raise ImageError("cannot identify the picture: it is empty (0 bytes)")
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        kind = next((kind for magic, kind in NO_PICTURES if text.startswith(magic.lower())), "")
        raise ImageError(
            f"this is {kind}" if kind else "cannot identify the picture: Pillow does not read this format"
        ) from error
