"""Videos whose frames are tiles against transformers: which frames, their text and their pixels.

Logits of them are in tests/parity/test_families.py.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rave_jax.checkpoint.tiny import Tiny, write_tiny_files
from rave_jax.data.processor import Processor
from rave_jax.families.config import tower_of
from rave_jax.families.internvl.video import Sampling
from rave_jax.families.shared.resampling import resized
from rave_jax.families.shared.tiles import TileTowerConfig
from rave_jax.families.smolvlm.numbers import spelled
from rave_jax.families.smolvlm.video import VideoLimits
from tests.data.pictures import noise
from tests.parity.test_families import Case, conversations, with_files

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).with_name("videos_torch.py")
FAMILIES = ("internvl", "smolvlm")


def run(torch_python: str, folder: Path, **cases: Any) -> Any:
    """What transformers says of these lists of cases."""
    lists = {name: cases.get(name, []) for name in ("internvl", "smolvlm", "sizes", "resized", "words", "talks")}
    (folder / "cases.json").write_text(json.dumps(lists))
    subprocess.run([torch_python, SCRIPT, folder], check=True, timeout=300)
    return np.load(folder / "out.npz")


def test_frames_sizes_and_numbers(torch_python: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    cases: dict[str, list[dict[str, Any]]] = {"internvl": [], "smolvlm": []}
    for total in [1, 2, 3, 20, *map(int, rng.integers(1, 4000, 150))]:
        fps, wanted = float(rng.choice([0.5, 1, 23.976, 29.97, 30])), float(rng.choice([0.5, 1, 2, 4]))
        case: dict[str, Any] = {"total": total, "fps": fps, "wanted": wanted}
        cases["smolvlm"].append(case | {"num_frames": int(rng.choice([1, 7, 64]))})
        shift = rng.choice([True, True, False, 1])
        case["shift"] = bool(shift) if shift != 1 or rng.random() < 0.7 else int(rng.integers(0, 1 + total // 4))
        cases["internvl"].append(case | {"num_frames": int(rng.integers(1, min(total, 64) + 1))})
        if int(total / fps * wanted) in range(1, total + 1):
            cases["internvl"].append(case | {"num_frames": None})
    sizes = [{"height": int(h), "width": int(w), "longest": int(e)} for h, w, e in rng.integers(2, 5000, (100, 3))]
    numbers = [*range(130), 999, 1000, 1001, 1100, 12_345, 100_000, 1_000_001, *map(int, rng.integers(0, 10**9, 100))]
    theirs = run(torch_python, tmp_path, **cases, sizes=sizes, words=numbers)
    for n, case in enumerate(cases["internvl"]):
        shift = None if case["shift"] is True else float(case["shift"])
        ours = Sampling(case["num_frames"], case["wanted"], shift).indices(case["total"], case["fps"])
        used = theirs[f"internvl{n}"]
        # Theirs gives one index more for some lengths, that of a frame behind the last.
        np.testing.assert_array_equal(ours, used[used < case["total"]], err_msg=str(case))
    for n, case in enumerate(cases["smolvlm"]):
        ours = VideoLimits(case["wanted"], case["num_frames"]).indices(case["total"], case["fps"])
        np.testing.assert_array_equal(ours, theirs[f"smolvlm{n}"], err_msg=str(case))
    for n, size in enumerate(sizes):
        ours = VideoLimits(longest=size["longest"]).frame_size(size["height"], size["width"])
        assert ours == tuple(theirs[f"sizes{n}"]), size
    for n, number in enumerate(numbers):
        assert spelled(number) == "".join(map(chr, theirs[f"words{n}"]))


def test_resized_pixels_are_those_of_torch(torch_python: str, tmp_path: Path) -> None:
    """Bit for bit, of noise and of black and white, which runs over the range of bytes."""
    rng = np.random.default_rng(3)
    pictures, cases = [], []
    for number in range(60):
        most = (12, 90, 400)[number % 3]
        old, new = rng.integers(2, most, 2), rng.integers(2, most, 2)
        pixels = noise(int(old[0]), int(old[1]), seed=number)
        pictures.append(pixels if number % 2 else (pixels > 127).astype(np.uint8) * 255)
        np.save(tmp_path / f"{number}.npy", pictures[-1])
        filter = ("bicubic", "lanczos")[number % 4 // 2]
        cases.append({"pixels": f"{number}.npy", "height": int(new[0]), "width": int(new[1]), "filter": filter})
    theirs = run(torch_python, tmp_path, resized=cases)
    for number, (case, pixels) in enumerate(zip(cases, pictures, strict=True)):
        ours = resized(pixels, case["height"], case["width"], case["filter"])
        np.testing.assert_array_equal(ours, theirs[f"resized{number}"], err_msg=str(case))


def directory(folder: Path, family: str, words: Path, **video: Any) -> Path:
    """A model's directory without weights, whose tokenizer joins letters and spaces as released ones do."""
    folder.mkdir()
    write_tiny_files(folder, Tiny(family=family, patch_size=8))
    file = folder / "video_preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | video))
    special = json.loads((folder / "tokenizer_config.json").read_text())["additional_special_tokens"]
    tokenizer = Tokenizer(models.BPE.from_file(str(words / "vocab.json"), str(words / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = tokenizer.token_to_id({"internvl": "<IMG_CONTEXT>", "smolvlm": "<image>"}[family])
    config["text_config"]["vocab_size"] = tokenizer.get_vocab_size()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def talks_in(folder: Path, frames: int) -> list[list[dict[str, Any]]]:
    """Conversations with words right before and behind videos, pictures beside them, and several turns."""
    visuals = (
        ((frames, 37, 150, 29.97),),
        ((frames, 90, 21, 3.0), (frames, 16, 16, 0.7)),
        ((70, 33), (frames, 41, 47, 1.0), (20, 61)),
    )
    return conversations(Case("", pictures=visuals), folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_pixels_are_those_of_transformers(
    family: str, shared_data: Path, torch_python: str, tmp_path: Path
) -> None:
    """With every frame and with some, of videos of 1 frame to 16, by a tokenizer that joins words across a video's
    borders."""
    sampled = {"do_sample_frames": True, "num_frames": 2, "fps": 1, "initial_shift": True}
    settings = {1: {"do_sample_frames": False}, 5: sampled, 16: {"do_sample_frames": False}}
    words, talks = shared_data / "tokenizer_qwen", []
    for frames, video in settings.items():
        own = directory(tmp_path / str(frames), family, words, **video)
        talks += [{"folder": own.name, "messages": messages} for messages in talks_in(own, frames)]
    theirs = run(torch_python, tmp_path, talks=talks)
    for number, talk in enumerate(talks):
        own = tmp_path / talk["folder"]
        processor = Processor.from_hf(own)
        example = processor.encode(with_files(talk["messages"], own), add_generation_prompt=True)
        np.testing.assert_array_equal(example.tokens, theirs[f"input_ids:{number}"][0], err_msg=f"{number}")
        values = theirs[f"pixel_values:{number}"]
        vision = tower_of(processor.rules.config, TileTowerConfig)
        np.testing.assert_allclose(
            planes(example.patches.pixels, vision), values.reshape(-1, *values.shape[-3:]), atol=1e-5
        )


def planes(pixels: np.ndarray, vision: TileTowerConfig) -> np.ndarray:
    """Our bytes as tiles [N,3,H,W], normalised."""
    units, merge, p = vision.token_side, vision.merge_size, vision.patch_size
    cells = pixels.reshape(-1, units, units, merge, merge, 3, p, p).transpose(0, 5, 1, 3, 6, 2, 4, 7)
    mean, std = (np.asarray(x, np.float64).reshape(3, 1, 1) for x in (vision.pixel_mean, vision.pixel_std))
    return (cells.reshape(-1, 3, vision.image_size, vision.image_size) / 255 - mean) / std
