"""A byte-level tokenizer, a processor over it, and pictures to feed it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rave_jax.data.processor import Processor
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.pictures import PictureRules
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.families.shared.grids.pictures import Pictures
from tests.data.pictures import noise

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, behind the special tokens."""
    vocab = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def tiny_settings(tokenizer: PreTrainedTokenizerFast) -> Pictures:
    """Patches of 4 pixels, windows of 2 x 2 merge units, so that small pictures have many of everything."""
    ids = {f"{name}_token_id": tokenizer.get_vocab()[f"<|{name}_pad|>"] for name in ("image", "video")}
    return Pictures(replace(tiny(), **ids), min_pixels=64, max_pixels=64 * 64)


TEXT_ALONE = PictureRules(VlmConfig(TextConfig(), family="qwen3"))
"""What a text model makes of pictures: nothing."""


@pytest.fixture(scope="session")
def processor() -> Processor:
    """A processor with a byte-level tokenizer and small patches."""
    tokenizer = byte_tokenizer()
    return Processor(tokenizer, tiny_settings(tokenizer), TEMPLATE)


@pytest.fixture(scope="session")
def qwen_dir(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text and picture settings of Qwen2.5-VL-7B-Instruct in one folder, without weights."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    for name in ("vocab.json", "merges.txt", "qwen2_5_vl/tokenizer_config.json", "qwen2_5_vl/chat_template.json"):
        shutil.copy(shared_data / "tokenizer_qwen" / name, folder)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(shared_data / "configs/qwen2.5-vl-7b-instruct" / name, folder)
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_dir: Path) -> Processor:
    """The processor of Qwen2.5-VL-7B-Instruct."""
    return Processor.from_hf(qwen_dir)


@pytest.fixture
def qa_folder(tmp_path: Path) -> Path:
    """Ten questions about ten pictures; record 3's picture is cut in half, 5's answer is blank, 7's is far too long."""
    (tmp_path / "images").mkdir()
    with (tmp_path / "qa.jsonl").open("w") as file:
        for number in range(10):
            path = tmp_path / "images" / f"{number}.jpg"
            Image.fromarray(noise(24, 32, seed=number)).save(path, quality=95)
            if number == 3:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            answer = {5: "  ", 7: "long " * 200}.get(number, str(number))
            record = {"id": f"q{number}", "image": f"images/{number}.jpg", "question": "Which?", "answers": [answer]}
            file.write(json.dumps(record) + "\n")
    return tmp_path
