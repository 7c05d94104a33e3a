"""A run that is killed (kill -9) again and again against one that is left alone: no number may differ.

Each life of the run ends at a random moment: in a step, in the writing of a checkpoint, or between the start and the
first batch. At the end the rows of metrics and the parameters of the last checkpoint are compared bit for bit.

    python benchmarks/kills.py [--json FILE] [--kills 200] [--seed 0] [--config tests/resume/small_run.py]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rave_jax.observe.metrics import OF_TIME, read_jsonl

MOMENTS = ("step", "save", "batch")
STEPS_OF_A_LIFE = 3
"""How many further steps a life reaches on average before it is killed in a step."""


def start(config: str, folder: Path, steps: int) -> subprocess.Popen:
    """Begin or continue the run; each step is logged, each second one saved."""
    words = [sys.executable, "train.py", config, "--output_dir", str(folder), "--simulated_devices", "2"]
    words += ["--steps", str(steps), "--log_every", "1", "--save_every", "2"]
    repo = Path(__file__).parents[1]
    there = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo)}
    return subprocess.Popen(words, cwd=repo, env=there, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rows(folder: Path) -> list[dict]:
    """Rows of metrics without those of time."""
    found = read_jsonl(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in OF_TIME} for row in found]


def parameters(folder: Path, step: int) -> str:
    """A digest of the parameters of a step, array by array."""
    program = (
        "import sys, hashlib, numpy as np\n"
        "from orbax.checkpoint import v1 as ocp\n"
        "found = ocp.load_checkpointables(sys.argv[1], {'parameters': None})['parameters']['values']\n"
        "print(hashlib.sha256(b''.join(np.asarray(found[n]).tobytes() for n in sorted(found))).hexdigest())\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", program, str(folder / "checkpoints" / str(step))]
    there = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.run(words, env=there, check=True, capture_output=True, text=True).stdout.strip()


def wait_for(job: subprocess.Popen, folder: Path, moment: str, chance: random.Random) -> bool:
    """Wait until the moment to kill; False where the run ended before."""
    metrics, began = folder / "metrics.jsonl", time.monotonic()
    before = metrics.read_text().count("\n") if metrics.exists() else 0
    further = chance.randint(1, 2 * STEPS_OF_A_LIFE)
    pause = chance.uniform(0, 12)
    while job.poll() is None:
        if moment == "batch" and time.monotonic() - began > pause:
            return True
        if moment == "step" and metrics.exists() and metrics.read_text().count("\n") >= before + further:
            time.sleep(chance.random() * 0.05)
            return True
        if moment == "save" and any((folder / "checkpoints").glob("*tmp*")):
            time.sleep(chance.random() * 0.02)
            return True
        time.sleep(0.001)
    return False


def main() -> None:
    """Kill, continue and compare; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="A run that is killed again and again.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--kills", type=int, default=200, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--config", default="tests/resume/small_run.py", help="what is run")
    args = parser.parse_args()
    chance, killed = random.Random(args.seed), Counter[str]()
    steps = 20 + args.kills * (STEPS_OF_A_LIFE + 1)
    with tempfile.TemporaryDirectory() as name:
        alone, often = Path(name) / "alone", Path(name) / "often"
        left = start(args.config, alone, steps)
        errors = left.communicate()[1]
        if left.returncode:
            raise SystemExit(f"the run that is left alone failed: {errors[-2000:]}")
        while killed.total() < args.kills:
            moment = chance.choice(MOMENTS)
            job = start(args.config, often, steps)
            if not wait_for(job, often, moment, chance):
                errors = job.communicate()[1]
                if job.returncode:
                    raise SystemExit(f"the run could not be continued after {killed.total()} kills: {errors[-2000:]}")
                break
            job.kill()
            job.communicate()
            killed[moment] += 1
        last = start(args.config, often, steps)
        errors = last.communicate()[1]
        if last.returncode:
            raise SystemExit(f"the run could not be continued after {killed.total()} kills: {errors[-2000:]}")
        same_rows = rows(alone) == rows(often)
        same_parameters = parameters(alone, steps) == parameters(often, steps)
        digest = hashlib.sha256(json.dumps(rows(often)).encode()).hexdigest()[:12]
    where = f"cpu ({platform.machine()}), 2 simulated devices"
    told = ", ".join(f"{killed[moment]} in a {moment}" for moment in MOMENTS)
    title = f"{steps} steps killed {killed.total()} times ({told}): rows of metrics and parameters that differ"
    differ = (not same_rows) + (not same_parameters)
    found = {"name": title, "where": where, "value": differ, "unit": "", "aim": 0, "holds": differ == 0}
    print(f"{title}: {differ} (aim 0); rows {digest}")
    if args.json:
        args.json.write_text(json.dumps([found], indent=2) + "\n")
    raise SystemExit(differ > 0)


if __name__ == "__main__":
    main()
