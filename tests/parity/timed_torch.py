"""The torch side of tests/parity/test_timed.py: videos with times as transformers has them.

    python timed_torch.py FOLDER

FOLDER/cases.json holds four lists, each of which may be empty; FOLDER/out.npz gets an array per case and list:
- frames: {total, fps, wanted, least, most}, the frames that are used, and their times with one decimal
- sizes: {frames, height, width, cap, shortest, longest, patch_size}, the size of a resized frame
- positions: {types (0 text, 1 image, 2 video), images, videos (patch grids t, h, w)}
- talks: conversations as in families_torch.py, their pictures in FOLDER, which is a model's directory without weights.
  The arrays of its processor are called NAME:NUMBER, such as input_ids:0.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import vision_torch
from families_torch import inputs_of
from transformers import Qwen3VLConfig, Qwen3VLModel
from transformers.image_utils import SizeDict
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

OPERATORS = vision_torch.OPERATORS  # declared before transformers is imported

PROCESSOR = Qwen3VLProcessor.__new__(Qwen3VLProcessor)


def frames(case: dict) -> np.ndarray:
    videos = Qwen3VLVideoProcessor(min_frames=case["least"], max_frames=case["most"])
    known = VideoMetadata(total_num_frames=case["total"], fps=case["fps"])
    used = videos.sample_frames(known, fps=case["wanted"])
    times = PROCESSOR._calculate_timestamps(used, case["fps"], 2)
    return np.concatenate([used, [float(f"{time:.1f}") for time in times]])


def sizes(case: dict) -> np.ndarray:
    videos = Qwen3VLVideoProcessor(max_video_tokens=30)
    made = videos.resize(
        torch.zeros(1, case["frames"], 1, case["height"], case["width"]),
        SizeDict(shortest_edge=case["shortest"], longest_edge=case["longest"]),
        resample=0,
        factor=2 * case["patch_size"],
        temporal_factor=2,
        cap_pixels_per_frame=case["cap"],
    )
    return np.array(made.shape[-2:])


def positions(case: dict) -> np.ndarray:
    model = Qwen3VLModel.__new__(Qwen3VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen3VLConfig()
    types = torch.tensor([case["types"]], dtype=torch.int32)
    images, videos = (torch.tensor(case[name]) if case[name] else None for name in ("images", "videos"))
    found, _ = model.get_rope_index(torch.zeros_like(types, dtype=torch.long), types, images, videos)
    return found[:, 0].numpy()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    results = {
        f"{kind}{number}": answer(case)
        for kind, answer in (("frames", frames), ("sizes", sizes), ("positions", positions))
        for number, case in enumerate(cases[kind])
    }
    for number, messages in enumerate(cases["talks"]):
        results |= {f"{name}:{number}": value.numpy() for name, value in inputs_of(messages, folder, True).items()}
    np.savez(folder / "out.npz", **results)
