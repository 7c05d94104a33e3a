"""Conversations in a JSON or JSON Lines file, as LLaVA, ShareGPT, OpenAI, LLaMA-Factory and Alpaca write them.

A LLaVA record is `{"id", "image": name or list of names, "conversations": [{"from": "human" | "gpt", "value": text},
...]}`, with `<image>` in a text where a picture stands. `turns.py` has the other shapes of turns, `visuals.py`
those of pictures and videos, `keys.py` what may stand beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rave_jax.data.sample import Part, Sample, SampleError
from rave_jax.data.sources.conversation import conversation, last_answer
from rave_jax.data.sources.files import open_records
from rave_jax.data.sources.keys import take
from rave_jax.data.sources.turns import RECORD_KEYS, check_turns, record_id, turns_of
from rave_jax.data.sources.visuals import visual_parts


@dataclass(frozen=True)
class LlavaJson:
    """Conversations of a JSON file."""

    path: str = ""
    """The file: a JSON list, or JSON Lines if its name ends in .jsonl."""
    image_dir: str = ""
    """Folder that picture paths are relative to; empty for the file's own folder."""
    name: str = ""
    """Name in tables; empty for the file's name."""
    ignored: tuple[str, ...] = ()
    """Keys of records, turns and parts that are left out: nothing is learned from them."""

    def build(self) -> LlavaSource:
        """The source.

        Raises:
            ConfigError: no such file, or one that holds no records.
        """
        return LlavaSource(self)


class LlavaSource:
    """Samples of a file of conversations, by record number."""

    def __init__(self, config: LlavaJson):
        self._records = open_records(config.path)
        self._folder = Path(config.image_dir) if config.image_dir else self._records.path.parent
        self._ignored = frozenset(config.ignored)
        self.name = config.name or self._records.path.stem

    def __len__(self) -> int:
        return len(self._records)

    @property
    def fingerprint(self) -> str:
        """Of the records and their order."""
        return self._records.fingerprint

    @property
    def parts(self) -> tuple[Part, ...]:
        """The file is one part."""
        return (Part(len(self), self.fingerprint, str(self._records.path)),)

    def __getitem__(self, index: int) -> Sample:
        record, where = self._records[index], self._records.where(index)
        try:
            check_turns(record)  # before its keys: what is missing says more than what is there
            record = take(record, RECORD_KEYS, self._ignored, "the record")
            turns = turns_of(record, self._ignored)
            visuals = visual_parts(record, self._folder, where)
            messages = conversation(turns, visuals, self._folder, self._ignored)
            sample = Sample(
                id=record_id(record, index),
                messages=messages,
                answers=last_answer(messages),
                source=self.name,
                task=self.name,
            )
        except SampleError as error:
            raise error.at(where) from error
        return replace(sample, template=sample.question)
