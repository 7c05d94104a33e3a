"""Does a tokenizer fit a model? Every id that it can give needs a row in the model's embedding.

An array that is read beyond its end gives its last row in XLA, so an id without a row would be read as another token
and nothing would fail. Embeddings with more rows than the tokenizer has ids are common (they are padded) and fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.config import MARKERS, VlmConfig

FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")
"""Files that give a tokenizer its ids."""
PLACEHOLDERS = tuple(f"{name}_token_id" for name in MARKERS)
"""Ids of config.json that stand in prompts."""


def check_vocabulary(
    tokenizer: Any, rows: int, name: str = "the model", files: str = "the tokenizer", replaced: str = ""
) -> None:
    """Refuse a tokenizer with ids that an embedding has no rows for.

    Args:
        tokenizer: of transformers.
        rows: of the embedding.
        name: what an error calls the model.
        files: what it calls the tokenizer.
        replaced: a token that needs no row, as it never stands in a prompt (`PictureRules.video_placeholder`).

    Raises:
        ConfigError: names the first token without a row.
    """
    ids = ((number, token) for token, number in tokenizer.get_vocab().items() if token != replaced)
    beyond = sorted(pair for pair in ids if pair[0] >= rows)
    if not beyond:
        return
    number, token = beyond[0]
    raise ConfigError(
        f"{name} has an embedding of {rows:,} rows (vocab_size), but {files} gives the token {token!r} the id "
        f"{number:,}, and {len(beyond):,} tokens have ids from {rows:,} on: take the tokenizer files that were saved "
        f"with these weights, or resize the embedding to at least {beyond[-1][0] + 1:,} rows"
    )


def check_directory(directory: Path, config: VlmConfig, tokenizer: Any, replaced: str = "") -> None:
    """Refuse an HF directory whose tokenizer or placeholders have ids beyond the embedding that config.json states.

    Args:
        directory: with the files.
        config: what config.json says.
        tokenizer: what was read from the directory.
        replaced: as in `check_vocabulary`.

    Raises:
        ConfigError: names the files and the first token or placeholder without a row.
    """
    rows = config.text.vocab_size
    file = directory / "config.json"
    names = [name for name in FILES if (directory / name).is_file()]
    check_vocabulary(tokenizer, rows, str(file), f"the tokenizer of {', '.join(names)}", replaced)
    for key in PLACEHOLDERS:
        number = getattr(config, key)
        if number >= rows:
            raise ConfigError(
                f"{file}: {key} is {number:,}, but the embedding has {rows:,} rows (vocab_size): expected the id of a "
                f"token below that; take the config.json that was saved with these weights"
            )
