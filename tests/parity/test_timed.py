"""Videos with times between their frames against transformers: which frames, their times, sizes and positions; and what
becomes of conversations by the files of a released model."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rave_jax.batch import Kind
from rave_jax.data.processor import Processor
from rave_jax.families.qwen3_vl.presets import qwen3_vl_4b, tiny
from rave_jax.families.shared.position_table.pictures import FrameLimits, TimedPictures, times
from tests.data.conftest import TEMPLATE, byte_tokenizer
from tests.data.pictures import noise
from tests.parity.test_families import with_files

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).with_name("timed_torch.py")


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = byte_tokenizer()
    ids, names = tokenizer.get_vocab(), ("vision_start", "vision_end", "image", "video")
    words = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    markers = {f"{name}_token_id": ids[word] for name, word in zip(names, words, strict=True)}
    limits = FrameLimits(min_pixels=64, max_pixels=2048, fps=2.0)
    return Processor(tokenizer, TimedPictures(replace(tiny(), **markers), 64, 1024, limits), TEMPLATE)


def conversation(rng: np.random.Generator) -> list[dict]:
    """A question with up to four pictures and videos in it."""
    parts: list[dict] = [{"type": "text", "text": "q" * int(rng.integers(1, 5))}]
    for _ in range(rng.integers(0, 5)):
        height, width = map(int, rng.integers(4, 60, 2))
        if rng.random() < 0.5:
            frames = [noise(height, width)] * int(rng.integers(2, 12))
            parts.append({"type": "video", "video": frames, "fps": float(rng.choice([0.5, 1.0, 3.0]))})
        else:
            parts.append({"type": "image", "image": noise(height, width)})
    return [{"role": "user", "content": parts}]


def as_case(processor: Processor, messages: list[dict]) -> dict:
    """What transformers would be told of a conversation, and our positions."""
    example, rules = processor.encode(messages), processor.rules
    visual = example.info.kind == Kind.VISUAL
    types = np.where(visual & (example.tokens == rules.image_token_id), 1, 0)
    types = np.where(visual & (example.tokens == rules.video_token_id), 2, types)
    case: dict = {"types": types.tolist(), "images": [], "videos": [], "ours": example.positions}
    for part in messages[0]["content"]:
        if part["type"] == "image":
            grid = rules.image_grid(*part["image"].shape[:2])
            case["images"].append([1, 2 * grid[1], 2 * grid[2]])
        elif part["type"] == "video":
            size = part["video"][0].shape[:2]
            grid = rules.video_grid(*size, rules.frames(len(part["video"]), part["fps"]))
            case["videos"].append([grid[0], 2 * grid[1], 2 * grid[2]])
    return case


def test_frames_times_sizes_and_positions(processor: Processor, torch_python: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    frames = [
        {"total": int(total), "fps": float(fps), "wanted": float(wanted), "least": 4, "most": int(most)}
        for total in [2, 3, 4, 5, *rng.integers(2, 3000, 100)]
        for fps, wanted, most in [
            (rng.choice([1, 23.976, 29.97, 30]), rng.choice([0.5, 1, 2, 4]), rng.choice([7, 768]))
        ]
    ]
    sizes = [
        {
            "frames": int(rng.integers(2, 40)),
            "height": int(rng.integers(3, 300)),
            "width": int(rng.integers(3, 300)),
            "cap": bool(rng.random() < 0.5),
            "shortest": int(rng.choice([1024, 65536, 400_000])),
            "longest": int(rng.choice([300_000, 500_000, 2_000_000])),
            "patch_size": 16,
        }
        for _ in range(150)
    ]
    sizes = [case for case in sizes if case["shortest"] <= case["longest"]]
    talks = [as_case(processor, conversation(rng)) for _ in range(40)]
    ours = [case.pop("ours") for case in talks]
    cases = {"frames": frames, "sizes": sizes, "positions": talks, "talks": []}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, SCRIPT, tmp_path], check=True, timeout=300)
    theirs = np.load(tmp_path / "out.npz")

    rules = TimedPictures(qwen3_vl_4b())
    for number, case in enumerate(frames):
        limits = FrameLimits(fps=case["wanted"], min_frames=case["least"], max_frames=case["most"])
        found = replace(rules, video=limits).frames(case["total"], case["fps"])
        shown = [float(f"{seconds:.1f}") for seconds in times(found, 2)]
        np.testing.assert_array_equal([*found.indices, *shown], theirs[f"frames{number}"], err_msg=str(case))
    for number, case in enumerate(sizes):
        limits = FrameLimits(case["shortest"], case["longest"], cap_total=case["cap"], max_tokens=30)
        size = replace(rules, video=limits).frame_size(case["height"], case["width"], case["frames"])
        np.testing.assert_array_equal(size, theirs[f"sizes{number}"], err_msg=str(case))
    assert sum(bool(case["videos"]) for case in talks) > 10
    for number, positions in enumerate(ours):
        np.testing.assert_array_equal(positions, theirs[f"positions{number}"])


def talks_in(folder: Path) -> list[list[dict]]:
    """Conversations with pictures of odd sizes and videos, which are written to the folder."""

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    def written(name: str, size: tuple[int, int], seed: int) -> str:
        Image.fromarray(noise(*size, seed=seed)).save(folder / name)
        return name

    def image(size: tuple[int, int], seed: int) -> dict:
        return {"type": "image", "image": written(f"{seed}.png", size, seed)}

    def video(count: int, size: tuple[int, int], fps: float, seed: int) -> dict:
        return {
            "type": "video",
            "video": [written(f"{seed + n}.png", size, seed + n) for n in range(count)],
            "fps": fps,
        }

    return [
        [
            {"role": "system", "content": [text("Sei knapp.")]},
            {"role": "user", "content": [image((333, 517), 1), text(" what?!!<"), image((60, 900), 2)]},
            {"role": "assistant", "content": [text("Nothing.")]},
            {"role": "user", "content": [text("Sure?")]},
        ],
        # Sizes that the model takes as they are, and others.
        [{"role": "user", "content": [video(19, (96, 128), 8.0, 100), video(5, (64, 160), 1.5, 200), text("alike?")]}],
        [
            {
                "role": "user",
                "content": [video(4, (205, 333), 2.0, 300), video(4, (70, 45), 2.0, 400), text("made fit?")],
            }
        ],
    ]


def test_conversations_by_the_files_of_a_released_model(shared_data: Path, torch_python: str, tmp_path: Path) -> None:
    """Ids and pixels are those of its own processor."""
    words = shared_data / "tokenizer_qwen"
    released = (words / "qwen3_vl").iterdir(), (shared_data / "configs/qwen3-vl-4b-instruct").iterdir()
    for path in (words / "vocab.json", words / "merges.txt", *released[0], *released[1]):
        shutil.copyfile(path, tmp_path / path.name)
    talks = talks_in(tmp_path)
    (tmp_path / "cases.json").write_text(json.dumps({"frames": [], "sizes": [], "positions": [], "talks": talks}))
    subprocess.run([torch_python, SCRIPT, tmp_path], check=True, timeout=300)
    theirs, processor = np.load(tmp_path / "out.npz"), Processor.from_hf(tmp_path)
    vision = processor.rules.config.vision
    assert vision is not None
    names = ("pixel_values", "pixel_values_videos", "pixel_values_videos")
    for number, (messages, name) in enumerate(zip(talks, names, strict=True)):
        example = processor.encode(with_files(messages, tmp_path), add_generation_prompt=True)
        np.testing.assert_array_equal(example.tokens, theirs[f"input_ids:{number}"][0])
        # The mean and deviation are those of every channel.
        pixels = (example.patches.pixels.astype(np.float32) / 255 - vision.pixel_mean[0]) / vision.pixel_std[0]
        np.testing.assert_allclose(pixels, theirs[f"{name}:{number}"], atol=1e-5)
