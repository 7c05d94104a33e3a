"""The API of scripts and notebooks: quick to import, one object for a model, and the numbers of everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rave_jax
from rave_jax.checkpoint.tiny import write_tiny
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.sample import SampleError
from rave_jax.inference import Completion, Request, Sampling, SlotConfig
from rave_jax.parallel.mesh import MeshConfig, abstract_mesh
from rave_jax.tools.cli import main
from tests.data.pictures import noise
from tests.tools.test_cli import SMALL

SLOTS = SlotConfig(slots=1, max_length=128, chunk=64)
FEW = Sampling(max_new_tokens=8)
WIDE, TALL = noise(84, 56), noise(56, 84, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("api") / "model", SMALL)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> rave_jax.LoadedModel:
    return rave_jax.load(folder, slots=SLOTS)


def user(text: str, *pictures: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_the_import_is_quick_and_brings_no_jax_in() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import rave_jax; took = time.perf_counter() - began\n"
        "assert {'load', 'Sampling'} <= set(dir(rave_jax)) and rave_jax.ConfigError.__name__ == 'ConfigError'\n"
        "assert not hasattr(rave_jax, 'nothing')\n"
        "print(took, *(name for name in ('jax', 'flax', 'numpy', 'transformers') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    took, *brought = done.stdout.split()
    assert float(took) < 1 and brought == []


def test_every_public_name_is_there() -> None:
    assert all(getattr(rave_jax, name).__name__ == name for name in rave_jax.__all__)


def test_it_answers_as_the_command_does(
    folder: Path, loaded: rave_jax.LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max-length", "128", "--chunk", "64", "--max-new-tokens", "8")
    assert main(["generate", str(folder), "--prompt", "What?", *flags]) == 0
    answer = loaded.generate("What?", FEW)
    assert isinstance(answer, Completion) and capsys.readouterr().out == answer.text + "\n"
    assert "".join(loaded.stream("What?", FEW)) == answer.text
    assert loaded.generator.answers([Request(user("What?"), FEW)])[0] == answer
    assert loaded.config is loaded.model.config and loaded.directory == folder


def test_a_stream_that_is_left_ends_its_answer(loaded: rave_jax.LoadedModel) -> None:
    stream = loaded.stream("What?", Sampling(max_new_tokens=64))
    next(stream)
    assert loaded.generator.pending == 1
    stream.close()
    assert loaded.generator.pending == 0 and loaded.generate("What?", FEW).text


def test_what_cannot_be_asked_raises_its_error(loaded: rave_jax.LoadedModel, tmp_path: Path) -> None:
    for call in (loaded.generate, lambda asked: list(loaded.stream(asked))):
        with pytest.raises(SampleError, match=r"^messages: .* budget of max_length 128"):
            call("word " * 200)
    for call in (loaded.generate, loaded.forward, loaded.attention):
        with pytest.raises(SampleError, match="cannot identify"):
            call(user("?", b"no picture"))
    with pytest.raises(ConfigError, match="no such directory"):
        rave_jax.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="step 3 is asked for, but this is not a run"):
        rave_jax.load(loaded.directory, step=3)
    with pytest.raises(ConfigError, match="dtype is 'float16', expected float32 or bfloat16"):
        rave_jax.load(loaded.directory, dtype="float16")


def test_a_forward_of_a_conversation_is_that_of_its_batch(loaded: rave_jax.LoadedModel) -> None:
    """The greedy answer is the argmax of the logits; rows of a batch are those of their conversations."""
    asked = user("What is it?", WIDE)
    one = loaded.forward(asked, add_generation_prompt=True)
    assert one.logits is not None and one.hidden.shape[0] == one.logits.shape[0] == len(one.tokens)
    assert int(np.argmax(one.logits[-1])) == loaded.generate(asked, FEW).tokens[0]
    settings = loaded.processor.rules
    rows = [[loaded.processor.encode(user(f"What {n}?", WIDE), True)] for n in range(7)]
    rows.append([loaded.processor.encode(asked, True)])
    shape = BatchShape(8, 64, settings.patch_sizes.window)
    many = loaded.forward(collate(rows, shape, settings.patch_sizes), logits=False)
    assert many.logits is None and many.hidden.shape[:2] == (8, 64) == many.tokens.shape
    np.testing.assert_allclose(many.hidden[7, : len(one.tokens)], one.hidden, atol=1e-4)


def test_words_attend_over_each_picture(loaded: rave_jax.LoadedModel) -> None:
    asked = user("The red cell is red; which is näher?", WIDE, TALL)
    words = ("red", "cell", "näher", "The red cell")
    found = loaded.attention(asked, words)
    text = loaded.config.text
    assert found.weights.shape == (text.num_layers, 4, text.num_heads, len(found.tokens))
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)
    assert found.on("cell").weights.shape[2:] == (3, 2) and found.on("cell", image=2).weights.shape[2:] == (2, 3)
    # A word of one token attends to nothing behind it, and its last place counts.
    tokens = loaded.processor.tokenizer.convert_ids_to_tokens(found.tokens.tolist())
    last = max(place for place, token in enumerate(tokens) if token in ("red", "Ġred"))
    assert np.all(found.weights[:, 0, :, last + 1 :] == 0) and np.all(found.weights[:, 0, :, last] > 0)
    spelt = loaded.attention(asked, ("ä",)).weights
    first = next(place for place, token in enumerate(tokens) if token == "Ã")
    assert np.all(spelt[..., first + 1] > 0) and np.all(spelt[..., first + 2 :] == 0), "two bytes of one letter"


def test_without_words_the_last_token_attends(loaded: rave_jax.LoadedModel) -> None:
    asked = user("What?", WIDE)
    found = loaded.attention(asked, add_generation_prompt=True)
    assert found.words == ("",) and np.all(found.weights[..., -1] > 0)
    there = found.weights[:, 0][..., found.info.image == 1]
    np.testing.assert_allclose(found.on().weights.sum((-2, -1)), there.sum(-1), rtol=1e-5)


def test_words_and_pictures_that_are_not_there_are_named(loaded: rave_jax.LoadedModel) -> None:
    for words in (["zebra"], [""]):
        with pytest.raises(ConfigError, match=f"words is '{words[0]}', expected a text that the conversation has"):
            loaded.attention(user("What?", WIDE), words)
    with pytest.raises(ConfigError, match="expected a list of texts"):
        loaded.attention(user("What?", WIDE), "What")
    found = loaded.attention(user("What?", WIDE), ["What"])
    with pytest.raises(ConfigError, match="image is 2, expected 1 to 1"):
        found.on(image=2)
    with pytest.raises(ConfigError, match="word is 'red', expected one that was asked for: 'What'"):
        found.on("red")


def test_memory_is_planned_without_devices(folder: Path, loaded: rave_jax.LoadedModel, tmp_path: Path) -> None:
    """On an abstract mesh no weights are read; there need be none."""
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    planned = rave_jax.load(tmp_path, mesh=abstract_mesh(MeshConfig(), jax.device_count()))
    assert planned.parameter_bytes() == loaded.parameter_bytes()
    whole, here = rave_jax.load(tmp_path, mesh=abstract_mesh(MeshConfig(), 2), dtype="bfloat16").parameter_bytes()
    assert whole == loaded.parameter_bytes()[0] // 2 and whole / 2 <= here < whole
    with pytest.raises(ConfigError, match="abstract mesh, so it has no numbers"):
        planned.forward("What?")
