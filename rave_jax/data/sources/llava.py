"""LLaVA-style conversations: a JSON or JSON Lines file and a folder of images.

A record is `{"id", "image": name or list of names, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`,
with `<image>` in a text where a picture stands. `"video"` may be a list of frames or a folder of them, `"fps"` their
rate, and `<video>` their placeholder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rave_jax.data.sample import Sample, SampleError
from rave_jax.data.sources.records import conversation, last_answer, open_records, visual_parts


@dataclass(frozen=True)
class LlavaJson:
    """Conversations of a LLaVA-style file."""

    path: str = ""
    """The file: a JSON list, or JSON Lines where it ends in .jsonl."""
    image_dir: str = ""
    """Folder that image names are relative to; empty for the file's own folder."""
    name: str = ""
    """Name in tables; empty for the file's name."""

    def build(self) -> LlavaSource:
        """The source.

        Raises:
            ConfigError: no such file, or one that holds no records.
        """
        return LlavaSource(self)


class LlavaSource:
    """Samples of a LLaVA-style file, by record number."""

    def __init__(self, config: LlavaJson):
        self._records = open_records(config.path)
        self._folder = Path(config.image_dir) if config.image_dir else self._records.path.parent
        self.name = config.name or self._records.path.stem

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        where = self._records.where(index)
        record = self._records[index]
        try:
            messages = conversation(
                record.get("conversations") or record.get("messages") or (), visual_parts(record, self._folder)
            )
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from error
        sample = Sample(
            id=str(record.get("id", index)),
            messages=messages,
            answers=last_answer(messages),
            source=self.name,
            task=self.name,
        )
        return replace(sample, template=sample.question)
