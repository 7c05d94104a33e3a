"""The torch side of tests/parity/test_positions.py: positions, windows and frames as transformers has them.

    python positions_torch.py FOLDER

FOLDER/cases.json holds three lists; FOLDER/out.npz gets an array per case and list:
- positions: {types (0 text, 1 image, 2 video), images, videos (patch grids t, h, w), seconds, tokens_per_second}
- windows: {grids, window_size, patch_size}
- frames: {total, count}, the spacing rule of Qwen2VLVideoProcessor.sample_frames (its module needs torchvision)
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.vision_utils import get_vision_window_index


def positions(case: dict) -> np.ndarray:
    config = Qwen2_5_VLConfig()
    config.vision_config.tokens_per_second = case["tokens_per_second"]
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    types = torch.tensor([case["types"]], dtype=torch.int32)

    def tensor(values: list, **options) -> torch.Tensor | None:
        return torch.tensor(values, **options) if values else None

    result, _ = model.get_rope_index(
        torch.zeros_like(types, dtype=torch.long),
        types,
        image_grid_thw=tensor(case["images"]),
        video_grid_thw=tensor(case["videos"]),
        second_per_grid_ts=tensor(case["seconds"], dtype=torch.float32),
    )
    return result[:, 0].numpy()


def windows(case: dict) -> np.ndarray:
    index, bounds = get_vision_window_index(torch.tensor(case["grids"]), 2, case["window_size"], case["patch_size"])
    lengths = torch.diff(bounds) // 4
    return np.stack([index.numpy(), np.repeat(np.arange(len(lengths)), lengths.numpy())])


def frames(case: dict) -> np.ndarray:
    total, count = case["total"], case["count"]
    return torch.arange(0, total, total / count).int().numpy()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    results = {
        f"{kind}{number}": answer(case)
        for kind, answer in (("positions", positions), ("windows", windows), ("frames", frames))
        for number, case in enumerate(cases[kind])
    }
    np.savez(folder / "out.npz", **results)
