"""The torch side of test_export: what transformers makes of directories that we wrote.

    python export_torch.py OUT.json DIR...

A directory with adapter_config.json is a PEFT adapter: PEFT loads it on the base that it names.

For each directory: the keys that transformers misses or does not expect, whether every loaded number equals the
stored one, and, where DIR/request.json lies, the logits of that conversation in DIR.npz, by transformers' own image
processing, chat template and positions.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def load(folder: Path) -> tuple[torch.nn.Module, dict]:
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    stored = {key: value for file in folder.glob("model*.safetensors") for key, value in load_file(file).items()}
    held = {key.removeprefix("model.").removeprefix("language_model."): v for key, v in model.state_dict().items()}
    short = {key.removeprefix("model.").removeprefix("language_model."): v for key, v in stored.items()}
    problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    same = all(held[key].dtype == v.dtype and torch.equal(held[key], v) for key, v in short.items())
    return model, problems | {"same": same, "count": len(stored)}


def load_adapter(folder: Path) -> tuple[torch.nn.Module, dict]:
    from peft import PeftModel

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype="auto", attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected).*key")  # how PEFT tells of them
        adapted = PeftModel.from_pretrained(model, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    held = {key.replace(".default.weight", ".weight"): v for key, v in adapted.state_dict().items() if ".lora_" in key}
    same = held.keys() == stored.keys() and all(torch.equal(held[key], v) for key, v in stored.items())
    problems = {key: [] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return adapted.eval(), problems | {"same": same, "count": len(stored), "base": base}


def logits(model: torch.nn.Module, folder: Path, files: Path) -> dict[str, np.ndarray]:
    messages = json.loads((folder / "request.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(files)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    images = [str(folder / part["image"]) for part in parts if part["type"] == "image"]
    inputs = {}
    if images:
        from PIL import Image

        processor = Qwen2VLImageProcessorPil.from_pretrained(files)
        inputs = dict(processor([Image.open(path) for path in images], return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            count = int(grid.prod()) // processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        text = text.replace("<|placeholder|>", "<|image_pad|>")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    types = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        out = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, **inputs).logits
    return {"input_ids": ids[0].numpy(), "logits": out[0].float().numpy()}


if __name__ == "__main__":
    results = {}
    for folder in map(Path, sys.argv[2:]):
        adapter = (folder / "adapter_config.json").is_file()
        model, results[folder.name] = load_adapter(folder) if adapter else load(folder)
        if (folder / "request.json").is_file():
            files = Path(results[folder.name].get("base", folder))
            np.savez(folder.with_suffix(".npz"), **logits(model, folder, files))
    Path(sys.argv[1]).write_text(json.dumps(results))
