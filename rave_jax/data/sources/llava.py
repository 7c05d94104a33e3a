"""Conversations in a JSON or JSON Lines file, as LLaVA, ShareGPT, OpenAI, LLaMA-Factory and Alpaca write them.

A LLaVA record is `{"id", "image": name or list of names, "conversations": [{"from": "human" | "gpt", "value": text},
...]}`, with `<image>` in a text where a picture stands. `turns.py` has the other shapes of turns, `visuals.py`
those of pictures and videos, `keys.py` what may stand beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rave_jax.data.places import SCHEMES, place
from rave_jax.data.sample import Sample
from rave_jax.data.sources.conversation import conversation, last_answer
from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.keys import take
from rave_jax.data.sources.records import RecordSource, open_records
from rave_jax.data.sources.turns import RECORD_KEYS, check_turns, record_id, turns_of
from rave_jax.data.sources.visuals import visual_parts


@dataclass(frozen=True)
class LlavaJson:
    """Conversations of a JSON file."""

    path: str = ""
    """The file: a JSON list, or JSON Lines if its name ends in .jsonl. It may be a URL, gs://... or s3://..."""
    image_dir: str = ""
    """Folder that picture paths are relative to; empty for the file's own folder."""
    name: str = ""
    """Name in tables; empty for the file's name."""
    ignored: tuple[str, ...] = ()
    """Keys of records, turns and parts that are left out: nothing is learned from them."""
    where: tuple[FieldIs, ...] = ()
    """Which records are used; all of these hold. Empty for every record."""

    url_schemes: ClassVar = tuple(SCHEMES)

    def build(self) -> LlavaSource:
        """The source.

        Raises:
            ConfigError: no such file, or one that holds no records.
        """
        return LlavaSource(self)


class LlavaSource(RecordSource):
    """Samples of a file of conversations, by record number."""

    def __init__(self, config: LlavaJson):
        records = open_records(config.path)
        super().__init__(config, records, place(config.image_dir) if config.image_dir else records.path.parent)
        self.name = config.name or records.path.stem

    def sample(self, record: dict[str, Any], index: int, where: str) -> Sample:
        """The conversation of a record."""
        return conversation_of(record, index, where, self)


def conversation_of(record: dict[str, Any], index: int, where: str, source: RecordSource) -> Sample:
    """The conversation of a record in any of the shapes of turns.

    Raises:
        SampleError: the record cannot be used.
    """
    check_turns(record)  # before its keys: what is missing says more than what is there
    record = take(record, RECORD_KEYS, source.unread(RECORD_KEYS), "the record")
    turns = turns_of(record, source.ignored)
    visuals = visual_parts(record, source.folder, where)
    messages = conversation(turns, visuals, source.folder, source.ignored)
    sample = Sample(
        id=record_id(record, index),
        messages=messages,
        answers=last_answer(messages),
        source=source.name,
        task=source.name,
    )
    return replace(sample, template=sample.question)
