"""The torch side of tests/parity/test_videos.py: videos of families whose frames are tiles, as transformers has them.

    python videos_torch.py FOLDER

FOLDER/cases.json holds these lists; FOLDER/out.npz gets an array for each case, by the name of the list and its number:
- internvl, smolvlm: {total, fps, num_frames, wanted, shift (internvl alone)}, the frames that are used
- sizes: {height, width, longest}, the size that SmolVLM's frames have before they are tiles
- resized: {pixels (a file of FOLDER), height, width, filter}, its pixels in that size
- words: a number, the characters of how it is written
- talks: {folder, messages}, conversations as in families_torch.py with a model's directory without weights. Arrays of
  its processor are called NAME:NUMBER, such as input_ids:0.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import vision_torch
from families_torch import inputs_of
from num2words import num2words
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor, get_resize_output_image_size
from transformers.video_utils import VideoMetadata

OPERATORS = vision_torch.OPERATORS  # declared before transformers is imported


def metadata(case: dict) -> VideoMetadata:
    return VideoMetadata(total_num_frames=case["total"], fps=case["fps"], duration=case["total"] / case["fps"])


def internvl(case: dict) -> np.ndarray:
    videos = InternVLVideoProcessor(initial_shift=case["shift"])
    return videos.sample_frames(metadata(case), num_frames=case["num_frames"], fps=case["wanted"]).numpy()


def smolvlm(case: dict) -> np.ndarray:
    videos = SmolVLMVideoProcessor()
    return videos.sample_frames(metadata(case), num_frames=case["num_frames"], fps=case["wanted"])


def sizes(case: dict) -> np.ndarray:
    return np.array(get_resize_output_image_size(torch.zeros(1, 3, case["height"], case["width"]), case["longest"]))


def resized(case: dict) -> np.ndarray:
    # Two of them: torch fails on some single pictures of one row or column.
    pixels = torch.from_numpy(np.stack([np.load(folder / case["pixels"])] * 2)).permute(0, 3, 1, 2).contiguous()
    mode = InterpolationMode(case["filter"])
    return resize(pixels, [case["height"], case["width"]], mode, antialias=True)[0].permute(1, 2, 0).numpy()


def words(number: int) -> np.ndarray:
    return np.array([ord(character) for character in num2words(number)])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    answers = (internvl, smolvlm, sizes, resized, words)
    results = {f"{of.__name__}{n}": of(case) for of in answers for n, case in enumerate(cases[of.__name__])}
    for number, talk in enumerate(cases["talks"]):
        found = inputs_of(talk["messages"], folder / talk["folder"], True)
        results |= {f"{name}:{number}": value.numpy() for name, value in found.items()}
    np.savez(folder / "out.npz", **results)
