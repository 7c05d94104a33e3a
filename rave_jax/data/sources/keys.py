"""Which keys of a record are read, which may pass unread, and which are refused: nothing to learn from is dropped.

A key that holds something and is not read ends in an error by its name, unless it is one of three kinds: a name that is
metadata in every data set we know (`METADATA`) or describes a picture that is there (`ANNOTATIONS`), a number or truth
value under a name that speaks of nothing else, or a name that the user gave in the source's `ignored`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

from rave_jax.config import shown
from rave_jax.data.sample import UnreadKey


def _words(text: str) -> list[str]:
    return text.split()


METADATA = frozenset(
    _words("""
    id ids idx index uid uuid guid hash md5 sha256 key record_id sample_id example_id question_id questionId
    conversation_id conv_id turn_id image_id img_id imageId docId doc_id page_id video_id clip_id
    dataset dataset_name data_source source sources origin collection set_name subset split data_split fold partition
    category categories subcategory topic topics subject domain tag tags keyword keywords skill skills
    task tasks task_id task_name task_type type kind question_type question_types question_kind answer_type chart
    field unit grade difficulty level quality rating ratings score scores confidence
    lang language languages locale license licence flickr_license_id copyright attribution
    flickr_original_url flickr_300k_url avatarUrl views author authors annotator annotator_id user_id worker_id
    model model_name model_id engine generator version revision
    created created_at updated_at date time timestamp timestamps
    width height size image_width image_height image_size width_list height_list resolution scale duration
    length num_tokens token_count num_turns
    metadata meta meta_data meta_info info extra extra_info additional_info debug
    human_or_machine image_classes detail ucsf_document_id ucsf_document_page_no
    """)
)
"""Names that say where a record is from, not what is to be learned."""

COUNTED = re.compile(
    r"(n|nb|num)_.+|.+_(id|idx|index|no|num|nr|count|len|length|size|h|w|height|width|hash|md5|sha1|sha256)"
)
"""Names of counts, sizes and marks of anything: metadata where they hold one number or one text."""

ANNOTATIONS = frozenset(
    _words(
        "bbox bboxes box boxes segments segmentation polygons instances structured_rep table ocr ocr_tokens "
        "url urls link file_name filename filepath"
    )
)
"""Names of what is written down about a picture. They pass where the picture itself is there."""

COLUMN = "column "
"""Stands before the name of a column that has the name of a key and is not read as that."""
NOTHING = ("[]", "{}", "null")
"""JSON in a text that holds nothing, as tables of one kind of column have it."""

PICTURED = ("image", "images", "video", "videos")

_PICTURE = "a picture belongs under 'image', several under 'images'"
_ADVICE = {
    "tools tool tool_calls tool_call tool_call_id function functions function_call": "tool calls are not supported",
    "audio audios input_audio audio_url sound sounds speech": "audio is not supported",
    "chosen rejected preferred dispreferred kto_tag preference": "preference pairs are not supported",
    "choices options choice_list context contexts passage passages hint hints lecture document documents "
    "instructions": "put it into the question, where it belongs there",
    "reasoning reasoning_content thinking thought thoughts cot rationale rationales explanation explanations solution "
    "refusal": "put it into the answer, where it belongs there",
    "image_path image_paths image_file image_files image_url image_urls image_name img imgs img_path picture pictures "
    "photo photos figure pixel_values": _PICTURE,
    "video_path video_paths video_url video_file frames frame clip clips": (
        "a video belongs under 'video', several under 'videos'"
    ),
    "weight weights loss losses loss_weight loss_weights loss_scale loss_mask mask masked train train_detail "
    "train_on_turn trainable training": "give each answer a 'weight' or 'loss' of its own",
    "min_pixels max_pixels total_pixels resized_height resized_width": (
        "data.min_pixels and data.max_pixels bound the sizes of all pictures"
    ),
    "nframes min_frames max_frames video_start video_end": "give the frames that are meant, with their 'fps'",
}
CONTENT = {name: advice for names, advice in _ADVICE.items() for name in names.split()}
"""Names under which data sets keep what is to be learned, and what to do where we do not read them."""

MOST_NAMED = 4
"""Keys that one error names at most."""

CLOSE = 0.8
"""From this likeness on, a name is taken for a misspelt one whatever it holds."""


def is_empty(value: object) -> bool:
    """Is there nothing to read: null, or a text, list or object without anything in it?"""
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and not value)


def take(given: Mapping[str, Any], read: Collection[str], ignored: Collection[str], what: str) -> dict[str, Any]:
    """What `given` holds under the keys that are read; keys that hold null are as good as missing.

    Args:
        given: a record, a turn or a part.
        read: the keys that the caller reads.
        ignored: keys that may pass unread; they win over `read`.
        what: what errors call it.

    Raises:
        UnreadKey: other keys hold something that could be learned from; it names them all.
    """
    taken, unread = {}, []
    pictured = any(not is_empty(given.get(key)) for key in PICTURED)
    for key, value in given.items():
        if value is None or key in ignored:
            continue
        if key in read:
            taken[key] = value
        elif not (passes(key, value, read) or (pictured and key in ANNOTATIONS)):
            unread.append(key)
    if unread:
        named = "; ".join(f"{_called(key, what)} is not read{_hint(key, read)}" for key in unread[:MOST_NAMED])
        raise UnreadKey(f"{named}; if nothing is to be learned from it, add it to the source's field `ignored`")
    return taken


def passes(key: str, value: object, read: Collection[str]) -> bool:
    """May this key pass unread?"""
    if key in METADATA or is_empty(value) or value in NOTHING:
        return True
    number = isinstance(value, (bool, int, float))
    if (number or isinstance(value, str)) and is_counted(key):
        return True
    return number and not is_content(key, read)


def is_metadata(name: str) -> bool:
    """Does a name say where a record is from, or count, measure or mark something, whatever it holds?"""
    return name in METADATA or is_counted(name)


def is_counted(name: str) -> bool:
    """Is it the name of a count, a size or a mark, and of nothing that could be learned from?"""
    return name not in CONTENT and COUNTED.fullmatch(name[:80]) is not None


def is_content(name: str, read: Collection[str]) -> bool:
    """Does a name, whatever it holds, speak of something to learn from, or look like a misspelt one that is read?"""
    return name not in METADATA | ANNOTATIONS and bool(_close(name, (*read, *CONTENT), CLOSE))


def may_be_picture(name: str) -> bool:
    """May a column of this name that holds bytes be one of pictures?"""
    return CONTENT.get(name, _PICTURE) == _PICTURE


def _called(key: str, what: str) -> str:
    return f"the {key}" if key.startswith(COLUMN) else f"the key {shown(key)} of {what}"


def _hint(key: str, read: Collection[str]) -> str:
    """What to do about a key that is not read."""
    close = _close(key, tuple(read), 0.7)
    if key.startswith(COLUMN):
        return ": another column is read in its place"
    if key in CONTENT:
        return f": {CONTENT[key]}"
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.lru_cache(maxsize=1024)
def _close(key: str, names: tuple[str, ...], likeness: float) -> list[str]:
    return difflib.get_close_matches(key[:80], sorted(names), 1, likeness)
