"""The torch side of test_gguf.py: what transformers answers from a GGUF file.

    python gguf_torch.py FOLDER

FOLDER/ask.json holds {directory, file, new, messages}, a list of conversations. Writes to FOLDER/answers.json for each
{prompt, tokens, text, gap}: token ids, the greedy answer, and how far the best logit was above the second, at least.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ask = json.loads((folder / "ask.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(ask["directory"], gguf_file=ask["file"])
    model = AutoModelForCausalLM.from_pretrained(ask["directory"], gguf_file=ask["file"], dtype=torch.float32).eval()
    answers = []
    for messages in ask["messages"]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=ask["new"],
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, prompt.shape[1] :].tolist()
        best = torch.cat(made.scores).topk(2).values
        answers.append(
            {
                "prompt": prompt[0].tolist(),
                "tokens": tokens,
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "gap": float((best[:, 0] - best[:, 1]).min()),
            }
        )
    (folder / "answers.json").write_text(json.dumps(answers))
