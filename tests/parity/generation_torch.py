"""The torch side of tests/parity/test_generation.py: greedy answers of random checkpoints by transformers' generate.

    python generation_torch.py FOLDER

FOLDER/cases.json lists cases {name, model: "vlm" | "text", config, seed, requests}. A request is {messages | tokens,
new, penalty, stop_at}: its prompt, the most new tokens, the repetition penalty, and places in the answer: the tokens
that stand there end it when it is given again. Pictures of messages are files in FOLDER/NAME, where tokenizer and
processor settings lie too. Writes the checkpoint to FOLDER/NAME and to FOLDER/NAME.out.npz, for each request by its
number:
- prompt: the token ids that generate was given,
- stops: the ids that ended the answer, beside the model's own,
- answer: the new ones, with the stop token if one came,
- gaps: how far the best logit was above the second at each step, as a part of the largest in size.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from qwen_torch import MODELS, randomise
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def liven(model: torch.nn.Module) -> None:
    """Make answers that vary and depend on the whole prompt.

    A random tied model says again what it read, unless what its layers add outweighs the embedding it began with; and
    the mean of thousands of keys says little of any, so attention is made to pick out a few.
    """
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)
        for name, parameter in model.named_parameters():
            if "visual" not in name and ("q_proj" in name or "q_norm" in name):
                parameter.mul_(3)


def inputs_of(request: dict, folder: Path, image_token_id: int | None) -> dict[str, torch.Tensor]:
    """One prompt alone, without padding: by transformers' own template, tokenizer and image processor."""
    if "tokens" in request:
        return {"input_ids": torch.tensor([request["tokens"]])}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = request["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    pictures = [Image.open(folder / part["image"]) for part in parts if part["type"] == "image"]
    seen = {}
    if pictures:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        seen = dict(processor(pictures, return_tensors="pt"))
        for grid in seen["image_grid_thw"]:
            count = int(grid.prod()) // processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        text = text.replace("<|placeholder|>", "<|image_pad|>")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return {"input_ids": ids, "mm_token_type_ids": (ids == image_token_id).int(), **seen}


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], request: dict, ends: list[int]):
    return model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        do_sample=False,
        max_new_tokens=request["new"],
        repetition_penalty=request["penalty"],
        eos_token_id=ends,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )


def answer(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], request: dict, ends: list[int]
) -> dict[str, np.ndarray]:
    length = inputs["input_ids"].shape[1]
    free = generate(model, inputs, request, ends).sequences[0, length:].tolist()
    stops = [free[place] for place in request["stop_at"]]
    made = generate(model, inputs, request, ends + stops)
    scores = torch.cat(made.scores)
    best, second = scores.topk(2).values.T
    return {
        "prompt": inputs["input_ids"][0].numpy(),
        "stops": np.array(stops, np.int64),
        "answer": made.sequences[0, length:].numpy(),
        "gaps": ((best - second) / scores.abs().amax(-1)).numpy(),
    }


def run(folder: Path, case: dict) -> None:
    config_class, model_class = MODELS[case["model"]]
    config = config_class(**case["config"])
    config._attn_implementation = "sdpa"
    model = model_class(config).eval()
    randomise(model, case["seed"])
    liven(model)
    own = folder / case["name"]
    model.save_pretrained(own)
    results = {}
    for number, request in enumerate(case["requests"]):
        inputs = inputs_of(request, own, case["config"].get("image_token_id"))
        made = answer(model, inputs, request, case["config"]["eos_token_id"])
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(folder / f"{case['name']}.out.npz", **results)


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    for case in json.loads((folder / "cases.json").read_text()):
        run(folder, case)
