"""Examine a model: `python eval.py RUN_OR_HF_DIR [--field.name value ...]` (with --help: the fields)."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.store import StoreError, check_writable
from rave_jax.config import ConfigError, override
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.evaluation.config import Eval, Examination, Report
from rave_jax.evaluation.report import EVALUATION, write_report
from rave_jax.evaluation.suites import evaluate
from rave_jax.evaluation.summary import print_summary
from rave_jax.models.vlm import Vlm
from rave_jax.observe.messages import plain_messages
from rave_jax.parallel import hosts
from rave_jax.parallel.mesh import make_mesh
from rave_jax.training.directory import run_directory
from rave_jax.training.run import load_run


def is_run(path: Path) -> bool:
    """Whether a directory is a run of ours; else it must be in HuggingFace format."""
    return run_directory(path).checkpoints.is_dir()


def defaults(path: Path) -> Examination:
    """What is done unless the command line says otherwise: for a run, what its config says."""
    if not is_run(path):
        return Examination()
    config = run_directory(path).read_config()
    evals = tuple(item for item in config.final if isinstance(item, Eval))
    reports = [item for item in config.final if isinstance(item, Report)]
    return Examination(evals or (Eval(),), (reports or [Report()])[0], simulated_devices=config.simulated_devices)


def load(path: Path, config: Examination, mesh: Mesh) -> tuple[Vlm, Processor]:
    """The model on the mesh, and its processor."""
    if not is_run(path):
        model = import_hf(path, config.model, mesh, jax.random.key(0))
        return model, Processor.from_hf(path, config.min_pixels, config.max_pixels, model.options.layout)
    if given := [name for name in ("model", "min_pixels", "max_pixels") if getattr(config, name) is not None]:
        raise ConfigError(f"{', '.join(given)}: not for a run such as {path}, which has its own")
    run = load_run(path, config.mesh, config.step)
    return run.model, run.processor


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if not argv or argv[0].startswith("-"):
        print("usage: eval.py RUN_OR_HF_DIR [--field.name value ...]   (eval.py RUN_OR_HF_DIR --help)", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    path = Path(argv[0])
    plain_messages()
    try:
        config = override(defaults(path), argv[1:], prog=f"eval.py {path}")
        hosts.start(config.hosts, config.simulated_devices)
        mesh = make_mesh(config.mesh)
        out = Path(config.output_dir or (path if is_run(path) else f"runs/eval-{path.resolve().name}"))
        check_writable(out, 0)
        model, processor = load(path, config, mesh)
        console = Console(quiet=not hosts.is_first())
        for item in config.evals:
            print_summary(evaluate(item, model, processor, mesh, out / EVALUATION / item.name), console)
        if hosts.is_first():
            console.print(f"report: {write_report(config.report, out)}", soft_wrap=True)
    except (ConfigError, StoreError, SampleError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
