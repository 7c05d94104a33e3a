"""Share of the loop's time that steps wait for saves, which are written in the background.

A run of a config with saves at a given distance; the share is that of its own metrics (`waited_for_saves`), without the
first row, whose step compiles.

    python benchmarks/save_stall.py [--json FILE] [--config configs/quickstart.py] [--steps 300] [--save-every 100]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from rave_jax.observe.metrics import read_jsonl

AIM = 0.02


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="What saves cost a run.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--config", default="configs/quickstart.py", help="what is run")
    parser.add_argument("--steps", type=int, default=300, help="steps of the run")
    parser.add_argument("--save-every", type=int, default=100, help="steps between two saves")
    args = parser.parse_args()
    repo = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        words = [sys.executable, "train.py", args.config, "--output_dir", str(run), "--final", "[]"]
        words += ["--steps", str(args.steps), "--save_every", str(args.save_every), "--log_every", "10"]
        subprocess.run(words, cwd=repo, env=os.environ | {"PYTHONPATH": str(repo)}, check=True, capture_output=True)
        found = read_jsonl(run / "metrics.jsonl")
        size = sum(f.stat().st_size for f in (run / "checkpoints" / str(args.steps)).rglob("*") if f.is_file())
    times = [(b["step"] - a["step"]) * b["step_time"] for a, b in itertools.pairwise(found)]
    waited = sum(t * row["waited_for_saves"] for t, row in zip(times, found[1:], strict=True)) / sum(times)
    step = sum(times) / (args.steps - 1)
    what = f"{args.steps} steps of {step:.3f} s, a save of {size / 1e6:.0f} MB every {args.save_every}"
    title = f"share of the loop's time that steps wait for saves: {what}"
    print(f"{title}: {waited:.2%} (aim <= {AIM:.0%})")
    if args.json:
        row = {"name": title, "where": f"cpu ({platform.machine()})", "value": round(waited, 5), "unit": "share"}
        args.json.write_text(json.dumps([row | {"aim": AIM, "holds": waited <= AIM}], indent=2) + "\n")


if __name__ == "__main__":
    main()
