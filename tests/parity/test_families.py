"""Every family from a HuggingFace directory to logits, answers and back, against transformers.

A case is a line in `CASES`: the small model of a family (`Family.small`) in odd sizes. Random weights, inputs, logits
and greedy answers come from transformers' own classes and processors.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.tiny import Tiny, write_tiny_files
from rave_jax.data.collate import collate, smallest_shape
from rave_jax.data.processor import Processor
from rave_jax.families import FAMILIES, family_named
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.models.config import ModelOptions
from tests.data.pictures import noise

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).with_name("families_torch.py")
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "mlp_size": 80,
    "vision_hidden_size": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_mlp_size": 64,
    "window_size": 28,
    "patch_size": 7,
}
NEW = 12
LEAST_GAP = 1e-4
LIMIT, KL_LIMIT = 2e-5, 3e-7


Visual = tuple[int, int] | tuple[int, int, int, float]


@dataclass(frozen=True)
class Case:
    """One small model and what it is asked.

    Fields:
        family: its name.
        sizes: changes to `SIZES`.
        frames: height and width of the frames of its video; None: no videos.
        pictures: (height, width) of the pictures of each conversation; (frames, height, width, fps) is a video.
        seed: of the weights.
        limit: most that logits may differ by, as a part of the largest.
    """

    family: str
    sizes: dict[str, Any] = field(default_factory=dict)
    frames: tuple[int, int] | None = None
    pictures: tuple[tuple[Visual, ...], ...] = ((), ((61, 90),), ((17, 120), (64, 40), (33, 33)))
    seed: int = 0
    limit: float = LIMIT


# transformers computes the gated delta rule by chunks in float32, which rounds by up to 2e-4 on these models.
BY_CHUNKS = 2e-4
TEXT = ((), (), ())
IN_TILES: tuple[tuple[Visual, ...], ...] = ((), ((61, 90),), ((17, 120), (64, 40), (33, 33), (20, 100)))
VIDEOS: tuple[tuple[Visual, ...], ...] = (
    ((16, 37, 50, 4.0),),
    ((1, 20, 90, 2.0), (1, 60, 31, 0.5)),
    ((40, 30), (3, 70, 21, 1.0), (50, 81)),
)
"""Of odd sizes. transformers takes several in a conversation where they have one number of frames."""
CASES = {
    case.family: case
    for case in (
        Case("qwen2_5_vl", frames=(50, 90)),
        Case("qwen3_vl", frames=(50, 90)),
        Case("qwen3_vl_moe", frames=(50, 90)),
        Case("qwen2_vl", frames=(50, 90)),
        Case("llava"),
        Case("llava_onevision", frames=(33, 47)),
        Case("internvl", {"patch_size": 8}, pictures=(*IN_TILES, *VIDEOS)),
        Case("smolvlm", {"patch_size": 8}, pictures=(*IN_TILES, *VIDEOS)),
        Case("llama", pictures=TEXT),
        Case("qwen2", pictures=TEXT),
        Case("qwen3", pictures=TEXT),
        Case("qwen3_5_text", {"num_layers": 4}, pictures=TEXT, limit=BY_CHUNKS),
        Case("qwen3_5", frames=(50, 90), limit=BY_CHUNKS),
        Case("qwen3_moe", pictures=TEXT),
    )
}


def test_every_family_has_its_case() -> None:
    assert set(CASES) == {name for name, family in FAMILIES.items() if family.small is not None} == set(FAMILIES)


def conversations(case: Case, folder: Path) -> list[list[dict[str, Any]]]:
    """One of each number of pictures, the last of several turns, and one with a video; writes the pictures."""

    def write(name: str, size: tuple[int, int], seed: int) -> str:
        Image.fromarray(noise(*size, seed=seed)).save(folder / name)
        return name

    def said(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    def visual(name: str, size: Visual, seed: int) -> dict[str, Any]:
        if len(size) == 2:
            return {"type": "image", "image": write(f"{name}.png", size, seed)}
        count, height, width, fps = size
        files = [write(f"{name}_{n}.png", (height, width), 1000 * (seed + 1) + n) for n in range(count)]
        return {"type": "video", "video": files, "fps": fps}

    asked = []
    for number, sizes in enumerate(case.pictures):
        parts: list[dict[str, Any]] = [said(f"Question {number}: what is it?")]
        for n, size in enumerate(sizes):
            parts.insert(n // 2, visual(f"{number}_{n}", size, 10 * number + n))
        asked.append([{"role": "user", "content": parts}])
    turns = [said("seven")], [said("And how many are there?")]
    asked[-1] += [{"role": role, "content": c} for role, c in zip(("assistant", "user"), turns, strict=True)]
    if case.frames is not None:
        files = [write(f"frame_{n}.png", case.frames, 100 + n) for n in range(8)]
        video = {"type": "video", "video": files, "fps": 4.0}
        asked.append([{"role": "user", "content": [said("In"), video, said("what moves?")]}])
    return asked


def with_files(messages: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The same conversation with paths of its pictures."""

    def whole(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "video":
            return part | {"video": [folder / file for file in part["video"]]}
        return part | {"image": folder / part["image"]} if part["type"] == "image" else part

    return [m | {"content": [whole(part) for part in m["content"]]} for m in messages]


@pytest.fixture(scope="module")
def folder(torch_python: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Checkpoints of the families that are asked for and what transformers makes of them, by one run of the script."""
    folder = tmp_path_factory.mktemp("families")
    chosen = {callspec.params.get("family") for item in request.session.items if (callspec := _params_of(item))}
    cases = []
    for case in (case for name, case in CASES.items() if name in chosen):
        own = folder / case.family
        own.mkdir()
        write_tiny_files(own, Tiny(**{**SIZES, **case.sizes, "family": case.family}))
        asked = conversations(case, own)
        cases.append({"name": case.family, "seed": case.seed, "new": NEW, "conversations": asked})
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, str(SCRIPT), "start", str(folder)], check=True, timeout=600)
    return folder


def _params_of(item: pytest.Item) -> Any:
    return getattr(item, "callspec", None) if item.path == Path(__file__) else None


def asked_of(folder: Path, family: str) -> list[list[dict[str, Any]]]:
    cases = {case["name"]: case for case in json.loads((folder / "cases.json").read_text())}
    return [with_files(messages, folder / family) for messages in cases[family]["conversations"]]


@pytest.mark.parametrize("family", CASES)
def test_tokens_and_logits_are_those_of_transformers(folder: Path, family: str) -> None:
    own, theirs = folder / family, np.load(folder / f"{family}.npz")
    processor, model = Processor.from_hf(own), import_hf(own, ModelOptions())
    examples = [processor.encode(m, add_generation_prompt=True) for m in asked_of(folder, family)]
    for number, example in enumerate(examples):
        np.testing.assert_array_equal(example.tokens, theirs[f"tokens{number}"], err_msg=f"conversation {number}")
    sizes = processor.rules.patch_sizes
    rows = [[example] for example in examples]
    batch = collate(rows, smallest_shape(rows, 8, sizes.window), sizes)

    @jax.jit
    def logits(model, batch):
        with jax.default_matmul_precision("highest"):
            return model.logits(model.forward(batch).hidden)

    ours = np.asarray(logits(model, batch), np.float64)
    for number, example in enumerate(examples):
        our, their = ours[number, : len(example.tokens)], theirs[f"logits{number}"].astype(np.float64)
        assert np.abs(their).max() > 0.5, "logits near zero would prove nothing"
        scale, limit = max(1.0, np.abs(their).max()), CASES[family].limit
        error = np.abs(our - their).max() / scale
        assert error <= limit, f"conversation {number}: {error:.1e}"
        assert divergence(their, our) <= KL_LIMIT
        best, our_best = (np.argsort(-x, axis=-1)[:, :5] for x in (their, our))
        # Logits that lie nearer than both may be off have no order.
        least = max(LEAST_GAP, 2 * limit * scale)
        certain = np.diff(-np.sort(-their, axis=-1)[:, :6]).max(axis=-1) < -least
        assert certain.any()
        np.testing.assert_array_equal(our_best[certain], best[certain])


def divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest Kullback-Leibler divergence of next-token distributions."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).max())


@pytest.mark.parametrize("family", CASES)
def test_greedy_answers_are_those_of_transformers(folder: Path, family: str) -> None:
    own, theirs = folder / family, np.load(folder / f"{family}.npz")
    asked = asked_of(folder, family)
    gaps = [theirs[f"gaps{n}"].min() for n in range(len(asked))]
    assert min(gaps) > LEAST_GAP, f"a near tie proves nothing, whoever wins it: take another seed {gaps}"
    slots = SlotConfig(slots=2, max_length=1024, chunk=128, smallest=128)
    requests = [Request(messages, Sampling(NEW)) for messages in asked]
    with jax.default_matmul_precision("highest"):
        ends = Generator(import_hf(own, ModelOptions()), Processor.from_hf(own), slots).answers(requests)
    stops = family_named(family).parse(json.loads((own / "config.json").read_text())).eos_token_ids
    for number, end in enumerate(ends):
        assert isinstance(end, Completion), end
        answer = theirs[f"answer{number}"].tolist()
        assert list(end.tokens) == (answer[:-1] if answer[-1] in stops else answer), f"conversation {number}"


def test_what_we_write_is_the_same_model(folder: Path, torch_python: str) -> None:
    """Weights byte for byte, in whichever style the checkpoint was; and transformers loads the directory."""
    for family in (case["name"] for case in json.loads((folder / "cases.json").read_text())):
        own, out = folder / family, folder / f"{family}.out"
        export_hf(import_hf(own, ModelOptions()), out, own)
        before, after = (load_file(path / "model.safetensors") for path in (own, out))
        assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
        assert all(after[key].tobytes() == value.tobytes() for key, value in before.items()), family
    subprocess.run([torch_python, str(SCRIPT), "again", str(folder)], check=True, timeout=600)
    for family, found in json.loads((folder / "again.json").read_text()).items():
        assert found["missing_keys"] == found["unexpected_keys"] == found["mismatched_keys"] == [], family
        assert found["difference"] == 0.0, family
