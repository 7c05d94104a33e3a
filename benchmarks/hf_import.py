"""HuggingFace import against plain safetensors reading, and its peak host memory, in one run.

A synthetic Qwen2.5-VL checkpoint of four files is written to a temporary folder (bfloat16, 1.2 GB, in the page cache
when it is read). Each round reads it all with `safetensors.numpy.load_file` and imports it, in turn, so that
a machine that slows down slows both; the ratio is the median over rounds of their time over ours.

Peak memory is the highest resident size during an import, sampled by the kernel (VmHWM), beyond what was resident
before and the parameters themselves, which on CPU devices lie in the same memory; it is stated against the largest
shard of a parameter on one device. Each where is measured in a process of its own, since freed memory stays resident.

    python benchmarks/hf_import.py [--json FILE] [--rounds 7]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.families import family_named
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl.config import MODEL_TYPE, VisionConfig
from rave_jax.families.shared.grids.hf import EOS_ID, MARKER_IDS
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters
from rave_jax.parallel.mesh import MeshConfig, make_mesh

OPTIONS = ModelOptions(param_dtype="bfloat16", compute_dtype="bfloat16")
SPEED_AIM, MEMORY_AIM = 0.8, 1.2
FILES = 4
MESHES = ("one device", "2 x 2 devices (fsdp x tensor)")
CONFIG = VlmConfig(
    text=TextConfig(
        vocab_size=32768,
        hidden_size=1536,
        num_layers=16,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_size=4224,
        mrope_section=(16, 24, 24),
        tie_embeddings=False,
    ),
    vision=VisionConfig(
        depth=8, hidden_size=640, num_heads=8, mlp_size=1728, full_attention_blocks=(3, 7), out_size=1536
    ),
    **MARKER_IDS,
    eos_token_ids=(EOS_ID,),
    family=MODEL_TYPE,
)


def write(folder: Path) -> None:
    """The checkpoint: random bfloat16 numbers, in files of about equal size."""
    family = family_named(CONFIG.family)
    rng = np.random.default_rng(0)
    files: list[dict[str, np.ndarray]] = [{} for _ in range(FILES)]
    rules = family.tensors(CONFIG)
    limit = sum(math.prod(rule.shape) for rule in rules) / FILES
    done = 0
    for rule in rules:
        size = math.prod(rule.shape)
        bits = rng.integers(0, 2**14, rule.shape, np.uint16)  # finite, whatever the bits
        files[min(FILES - 1, int(done / limit))][rule.hf_key] = bits.view(ml_dtypes.bfloat16)
        done += size
    index = {}
    for n, tensors in enumerate(files, start=1):
        name = f"model-{n:05d}-of-{FILES:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(family.render(CONFIG)))


def read_plainly(folder: Path) -> float:
    """Seconds in which safetensors reads every tensor."""
    gc.collect()
    start = time.perf_counter()
    held = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    seconds = time.perf_counter() - start
    assert len(held) == FILES
    return seconds


def import_it(folder: Path, mesh: Mesh | None) -> float:
    """Seconds of an import."""
    gc.collect()
    start = time.perf_counter()
    jax.block_until_ready(import_hf(folder, OPTIONS, mesh))
    return time.perf_counter() - start


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this kernel does not tell {field}")


def memory_ratio(folder: Path, mesh: Mesh | None) -> float:
    """Peak memory beyond the parameters over the largest shard. What an import before left resident counts too."""
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    model = jax.block_until_ready(import_hf(folder, OPTIONS, mesh))
    peak = _resident("VmHWM") - before
    arrays = [param[...] for param in named_parameters(model).values()]
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    largest = max(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    return (peak - held) / largest


def measure(folder: Path, where: str, rounds: int) -> list[dict[str, object]]:
    """The rows of one where."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2)) if where == MESHES[1] else None
    where = f"{where}, CPU ({platform.machine()})"
    import_it(folder, mesh)
    memory = memory_ratio(folder, mesh)
    read_plainly(folder)
    times = [(read_plainly(folder), import_it(folder, mesh)) for _ in range(rounds)]
    speed = statistics.median(theirs / ours for theirs, ours in times)
    rate = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9 / statistics.median(t for _, t in times)
    )
    peak = "HF import: peak host memory beyond the parameters"
    return [
        _row(
            "HF import: speed against plain safetensors reading",
            where,
            speed,
            "x",
            f">= {SPEED_AIM}",
            speed >= SPEED_AIM,
        ),
        _row("HF import: rate", where, rate, "GB/s", "", True),
        _row(peak, where, memory, "largest shards", f"<= {MEMORY_AIM}", memory <= MEMORY_AIM),
    ]


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="HuggingFace import: speed and memory.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of one reading and one import each")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WHERE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], args.rounds)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for where in MESHES:
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--measure", folder, where]
            rows += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for row in rows:
        aim = f" (aim {row['aim']})" if row["aim"] else ""
        print(f"{row['name']}, {row['where']}: {row['value']} {row['unit']}{aim}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def _row(name: str, where: str, value: float, unit: str, aim: str, holds: bool) -> dict[str, object]:
    return {"name": name, "where": where, "value": round(value, 2), "unit": unit, "aim": aim, "holds": holds}


if __name__ == "__main__":
    main()
