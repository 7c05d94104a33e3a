"""`eval.py` and `rave-jax eval`: examine a run or a model in HuggingFace format."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from rave_jax.checkpoint.store import check_writable
from rave_jax.command_line import override
from rave_jax.config import ConfigError, local_path
from rave_jax.data.processor import Processor
from rave_jax.evaluation.config import Eval, Examination, Report
from rave_jax.evaluation.report import EVALUATION, write_report
from rave_jax.evaluation.suites import evaluate
from rave_jax.evaluation.summary import print_summary
from rave_jax.models.vlm import Vlm
from rave_jax.observe.messages import plain_messages
from rave_jax.parallel import agree, hosts
from rave_jax.parallel.mesh import make_mesh
from rave_jax.tools import source as sources
from rave_jax.tools.job import EXIT_CONFIG, run_job
from rave_jax.tools.source import is_run
from rave_jax.training.directory import run_directory


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
    run = is_run(path)
    if not run and config.step is not None:
        raise ConfigError(f"step is {config.step}, but {path} is not a run: a model in HuggingFace format has no steps")
    if run and (given := [name for name in ("model", "min_pixels", "max_pixels") if getattr(config, name) is not None]):
        raise ConfigError(f"{', '.join(given)}: cannot be set for a run such as {path}, which has its own")
    model = sources.load(path, config.step, options=config.model, mesh=mesh, weights=config.weights).model
    special = config.special_tokens_in_text
    if run:
        return model, sources.processor_of(path, special)
    layout = model.options.layout
    return model, Processor.from_hf(path, config.min_pixels, config.max_pixels, layout, special or "text")


def main(argv: Sequence[str], prog: str = "eval.py") -> int:
    """Run the command line; returns the exit code. End the program with it by `stopping.leave`."""
    if not argv or argv[0].startswith("-"):
        print(f"usage: {prog} RUN_OR_HF_DIR [--field.name value ...]   ({prog} RUN_OR_HF_DIR --help)", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    plain_messages()
    try:
        path = local_path(argv[0], "the directory to examine").expanduser()
        config = override(defaults(path), argv[1:], prog=f"{prog} {path}")
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    return run_job(prog, config.hosts, config.simulated_devices, lambda _: examine(path, config))


def examine(path: Path, config: Examination) -> None:
    """Load the model, do the evaluations and write the page about them. Call `hosts.start` first.

    Raises:
        ConfigError: the config does not fit the machine, the model or the data.
        StoreError: a checkpoint cannot be read, or the output folder cannot be written.
        SampleError: a sample cannot be asked, and the evaluation is to stop then.
    """
    mesh = make_mesh(config.mesh)
    agree.check_same_config(config, "hosts")
    out = Path(config.output_dir or (path if is_run(path) else f"runs/eval-{path.resolve().name}"))
    check_writable(out, 0)
    model, processor = load(path, config, mesh)
    console = Console(quiet=not hosts.is_first())
    for item in config.evals:
        print_summary(evaluate(item, model, processor, mesh, out / EVALUATION / item.name), console)
    if hosts.is_first():
        console.print(f"report: {write_report(config.report, out)}", soft_wrap=True)
