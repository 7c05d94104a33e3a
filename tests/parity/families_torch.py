"""The torch side of tests/parity/test_families.py.

    python families_torch.py start FOLDER    random checkpoints, and what transformers computes with them
    python families_torch.py again FOLDER    what transformers makes of the directories that we wrote

FOLDER/cases.json lists cases {name, seed, new, conversations}; FOLDER/NAME holds a model's directory without weights,
and the pictures that its conversations name. A video is {"type": "video", "video": [FILE, ...], "fps": F}.

`start` writes the weights to FOLDER/NAME, and to FOLDER/NAME.npz, for each conversation by its number:
- tokens: what the model's own processor makes of it, with the header of an answer behind it,
- logits: of every token,
- answer: `new` greedy tokens, or fewer if one ends the answer,
- gaps: how far the best logit was above the second at each of them, as a part of the largest in size.

`again` writes to FOLDER/again.json, by name, the keys that transformers misses or does not expect in FOLDER/NAME.out,
and the largest difference of the first conversation's logits.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import vision_torch
from generation_torch import liven
from PIL import Image
from qwen_torch import randomise
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.video_utils import VideoMetadata

OPERATORS = vision_torch.OPERATORS  # declared before transformers is imported


def model_class(config):
    return AutoModelForImageTextToText if getattr(config, "vision_config", None) is not None else AutoModelForCausalLM


def inputs_of(messages: list, folder: Path, vision: bool) -> dict[str, torch.Tensor]:
    """One conversation alone, as the model's own processor has it."""
    if not vision:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return dict(tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    processor = AutoProcessor.from_pretrained(folder)
    # Pictures are made smaller by PIL, as models of these families were trained; the other way differs in a shade.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    # SmolVLM's processor has a template of its own for videos.
    own = type(processor).__name__ == "SmolVLMProcessor" and any(part["type"] == "video" for part in parts)
    template = processor if processor.chat_template or own else processor.tokenizer
    text = template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.open(folder / part["image"]).convert("RGB") for part in parts if part["type"] == "image"]
    videos, metadata = [], []
    for part in parts:
        if part["type"] == "video":
            videos.append(np.stack([np.asarray(Image.open(folder / file).convert("RGB")) for file in part["video"]]))
            metadata.append(
                VideoMetadata(
                    total_num_frames=len(videos[-1]),
                    fps=part["fps"],
                    duration=len(videos[-1]) / part["fps"],
                    frames_indices=list(range(len(videos[-1]))),
                    height=videos[-1].shape[1],
                    width=videos[-1].shape[2],
                )
            )
    # As `apply_chat_template` of a processor hands them on: pictures by conversation, and special tokens in front of a
    # text that does not begin with one.
    seen = {"images": [images]} if images else {}
    begun = text.startswith(processor.tokenizer.bos_token or "\0")
    if videos:
        seen |= {"videos": videos, "video_metadata": metadata}
    found = dict(processor(text=[text], add_special_tokens=not begun, return_tensors="pt", **seen))
    return found | (side_by_side(processor, parts, seen) if own and images else {})


def side_by_side(processor, parts: list, seen: dict) -> dict[str, torch.Tensor]:
    """Tiles and frames in their order. SmolVLM's processor loses the tiles of pictures beside a video."""
    images = processor.image_processor(seen["images"], return_row_col_info=True, return_tensors="pt")
    videos = processor.video_processor(**{k: seen[k] for k in ("videos", "video_metadata")}, return_tensors="pt")
    counts = [max(rows * cols + 1, 1) for rows, cols in zip(images["rows"][0], images["cols"][0], strict=True)]
    tiles, clips = iter(images["pixel_values"][0].split(counts)), iter(videos["pixel_values"])
    kinds = [part["type"] for part in parts]
    pixels = torch.cat([next(tiles if kind == "image" else clips) for kind in kinds if kind != "text"])[None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.int64)}


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0].float()


def start(folder: Path, case: dict) -> None:
    own = folder / case["name"]
    config = AutoConfig.from_pretrained(own)
    config._attn_implementation = "eager"
    model = model_class(config).from_config(config).eval()
    randomise(model, case["seed"])
    liven(model)
    processors = {path: path.read_bytes() for path in own.glob("*.json")}
    model.save_pretrained(own)
    for path, data in processors.items():
        if path.name not in ("config.json", "generation_config.json"):
            path.write_bytes(data)
    results = {}
    for number, messages in enumerate(case["conversations"]):
        inputs = inputs_of(messages, own, model_class(config) is AutoModelForImageTextToText)
        length = inputs["input_ids"].shape[1]
        made = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=case["new"],
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        scores = torch.cat(made.scores)
        best, second = scores.topk(2).values.T
        results |= {
            f"tokens{number}": inputs["input_ids"][0].numpy(),
            f"logits{number}": logits(model, inputs).numpy(),
            f"answer{number}": made.sequences[0, length:].numpy(),
            f"gaps{number}": ((best - second) / scores.abs().amax(-1)).numpy(),
        }
    np.savez(folder / f"{case['name']}.npz", **results)


def again(folder: Path, case: dict) -> dict:
    own, out = folder / case["name"], folder / f"{case['name']}.out"
    config = AutoConfig.from_pretrained(out)
    model, info = model_class(config).from_pretrained(
        out, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    vision = model_class(config) is AutoModelForImageTextToText
    found = logits(model.eval(), inputs_of(case["conversations"][0], own, vision)).numpy()
    before = np.load(folder / f"{case['name']}.npz")["logits0"]
    problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return problems | {"difference": float(np.abs(found - before).max())}


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(sys.argv[2])
    cases = json.loads((folder / "cases.json").read_text())
    if sys.argv[1] == "start":
        for case in cases:
            start(folder, case)
    else:
        (folder / "again.json").write_text(json.dumps({case["name"]: again(folder, case) for case in cases}))
