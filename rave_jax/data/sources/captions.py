"""Samples of records that may hold turns, a question, or a caption alone: members of archives, folders of pictures."""

from __future__ import annotations

from typing import Any

from rave_jax.config import shown
from rave_jax.data.sample import Sample, SampleError
from rave_jax.data.sources.keys import is_empty
from rave_jax.data.sources.llava import conversation_of
from rave_jax.data.sources.qa import question_of
from rave_jax.data.sources.records import RecordSource
from rave_jax.data.sources.turns import PAIRS, TURNS

CAPTIONS = ("caption", "text", "txt", "label")
"""Keys of a caption, or of the name of a class."""
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
"""How names of pictures end."""
FILMS = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
"""How names of video files end."""


def sample_of(
    record: dict[str, Any], index: int, where: str, source: RecordSource, asked: str, metric: str, suffix: str
) -> Sample:
    """The sample of a record: of its turns, else of its question, else its caption as the answer to `asked`.

    Raises:
        SampleError: it has none of them, several captions that differ, or cannot be used.
    """
    if any(not is_empty(record.get(key)) for key in (*TURNS, *PAIRS)):
        return conversation_of(record, index, where, source)
    if not is_empty(record.get("question")):
        return question_of(record, index, where, source, metric, suffix)
    found = [key for key in CAPTIONS if not is_empty(record.get(key)) and key not in source.ignored]
    if not found:
        raise SampleError(
            f"no turns, no question and no caption: there are {', '.join(map(shown, record)) or 'no keys'}; expected "
            f"one of {', '.join((*TURNS, 'question', *CAPTIONS))}"
        )
    if any(record[key] != record[found[0]] for key in found):
        raise SampleError(f"{' and '.join(map(repr, found))} are different captions: add one of them to `ignored`")
    rest = {key: value for key, value in record.items() if key not in CAPTIONS}
    return question_of({**rest, "question": asked, "answer": record[found[0]]}, index, where, source, metric, suffix)
