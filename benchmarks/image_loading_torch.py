"""The torch side of image_loading.py: a DataLoader whose batches transformers' processor makes.

Run by image_loading.py under the interpreter that has torch. Reads the name of a kind of files and of a backend per
line, answers with seconds of processor time for one pass over the files.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader

if importlib.util.find_spec("torchvision") is None:  # a copy that stands apart, with transforms in Python alone
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "parity"))
    importlib.import_module("vision_torch")

from transformers import AutoImageProcessor, AutoProcessor


def main(directory: str) -> None:
    """Say what there is, then make passes until standard input ends."""
    torch.set_num_threads(1)
    folder = Path(directory)
    told = json.loads((folder / "loading.json").read_text())
    processors = {}
    for backend in ("torchvision", "pil"):
        processors[backend] = AutoProcessor.from_pretrained(folder)
        processors[backend].chat_template = processors[backend].tokenizer.chat_template
        processors[backend].image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend)

    def seconds(kind: str, backend: str) -> float:
        records = [json.loads(line) for line in (folder / told["files"][kind]).read_text().splitlines()]
        processor = processors[backend]

        def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": Image.open(record["image"]).convert("RGB")},
                            {"type": "text", "text": record["question"]},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": record["answers"][0]}]},
                ]
                for record in batch
            ]
            return processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"padding": True, "return_tensors": "pt"},
            )

        start = time.process_time()
        patches = 0
        for batch in DataLoader(records, batch_size=told["batch"], collate_fn=collate):
            patches += len(batch["pixel_values"])
        assert patches == told["patches"][kind], (patches, told["patches"][kind])
        return time.process_time() - start

    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        kind, _, backend = line.strip().rpartition("/")
        print(seconds(kind, backend), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
