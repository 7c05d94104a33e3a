"""Does reading fewer visual tokens cost accuracy? Gaze Attention against dense attention on mosaics of digits.

Every seed first trains one dense backbone, the model of `configs/quickstart_gaze.py` without Gaze and without context
tokens. Each setting then goes on from it for as many steps, over the same samples in the same order, and answers the
same held-out questions, so that settings differ in nothing but what they say. An answer is right where the model's
greedy answer is the sample's, end included, from one forward pass over both (`evaluation/forced.py`). Settings learn at
ADAPTING of the backbone's rate: what is trained already is to change its reading, not to start again.

A finished pair of setting and seed is a file in OUT/rows and is not run again, and one of other steps or rates is
refused; what was interrupted goes on where it stopped. The table says what is missing, and what its numbers do not
decide.

    python benchmarks/gaze_results.py [--seeds 0 1 2] [--settings dense gaze_25 ...] [--out DIR] [--json FILE] [--table]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from rave_jax.attention import Gaze
from rave_jax.attention.gaze import TopKSchedule
from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.config import ConfigError, load_file, require
from rave_jax.data.collate import BatchShape
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.sample import Sample
from rave_jax.data.synthetic import Synthetic
from rave_jax.evaluation.accounting import account
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.forced import ForcedAnswers
from rave_jax.evaluation.paired import paired_difference, undecided
from rave_jax.evaluation.routing import hits, summarise
from rave_jax.evaluation.subject import Answer, ModelSubject
from rave_jax.look.maps import relative_box
from rave_jax.models.config import ModelOptions
from rave_jax.parallel import hosts
from rave_jax.parallel.stopping import Interrupted, StopRequest
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF, Tiny
from rave_jax.training.run import LoadedRun, load_run, train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart_gaze.py"
BASE = "dense"
SAMPLES, LOOKED_AT, ANSWER_TOKENS = 4096, 128, 4
ADAPTING = 0.3
FLOOR, WIDEST = 0.6, 0.015
"""Below FLOOR the base cannot do the task; intervals wider than WIDEST decide nothing."""
LOST = 0.01
"""Of right answers, that a setting may lose: all of its interval is to lie above."""


def settings(config: TrainConfig) -> dict[str, ModelOptions]:
    """What is compared, by name: the config's own model with what the name says; descriptors are means where it says
    nothing."""
    own = config.model
    (gaze,) = (m for m in own.mechanisms if isinstance(m, Gaze))

    def routed(**changes: Any) -> ModelOptions:
        return replace(own, mechanisms=(replace(gaze, **{"descriptor": "mean", **changes}),))

    descriptors = {f"{name}_25": routed(descriptor=name) for name in ("min_max", "spread", "oracle", "random")}
    return {
        BASE: replace(own, mechanisms=(), context=None),
        "context_only": replace(own, mechanisms=()),
        "gaze_50": routed(top_k=8),
        "gaze_25": routed(),
        "gaze_12": routed(top_k=2),
        "gaze_25_no_context": replace(routed(), context=None),
        "min_max_25_no_context": replace(routed(descriptor="min_max"), context=None),
        **descriptors,
        "gaze_25_at_once": routed(schedule=TopKSchedule(shape="none")),
    }


def seeded(config: TrainConfig, seed: int, **changes: Any) -> TrainConfig:
    """The config under a seed, without what follows training."""
    assert isinstance(config.init, Tiny)
    start = replace(config.init, seed=seed)
    common = {"seed": seed, "init": start, "final": (), "tensorboard": False, "save_every": 100, "keep": 1}
    return replace(config, **{**common, **changes})


def backbone(config: TrainConfig, seed: int, out: Path, options: ModelOptions) -> Path:
    """The dense backbone of a seed as a HuggingFace directory, trained where it is not there yet."""
    folder = out / f"backbone-{seed}"
    # A run of its own for small pictures: its rate falls before the large ones come.
    large = len(config.data.stages) - 1
    small = replace(config.data, stages=config.data.stages[:large])
    steps = config.data.stages[large].step
    first = exported(
        seeded(config, seed, output_dir=f"{folder}-small", model=options, data=replace(small, seed=seed), steps=steps)
    )
    data = questions(config, seed)
    changes = {"init": FromHF(str(first)), "data": data, "steps": config.steps - steps}
    return exported(seeded(config, seed, output_dir=str(folder), model=options, **changes))


def finished(config: TrainConfig) -> None:
    """Run an experiment to its end, or save and raise `Interrupted` when the job is asked to end."""
    with StopRequest(config.hosts.stop_timeout) as stop:
        train(config, stop)


def exported(config: TrainConfig) -> Path:
    """The result of a run as a HuggingFace directory; the run is made, or continued, where that is not there yet."""
    folder = Path(config.output_dir)
    if not (folder / "exported").is_dir():
        finished(config)
        export_hf(load_run(folder).model, folder / "exported", folder / "model")
    return folder / "exported"


def made_with(config: TrainConfig, steps: int) -> dict[str, Any]:
    """What rows must have in common to stand in one table."""
    return {
        "samples": SAMPLES,
        "steps": steps,
        "learning_rate": ADAPTING * config.optimizer.learning_rate,
        "backbone_steps": config.steps,
    }


def kept_rows(folder: Path, config: TrainConfig, steps: int) -> list[dict[str, Any]]:
    """The rows of a folder.

    Raises:
        ConfigError: one was made with other steps, samples or rates.
    """
    rows = []
    for file in sorted(folder.glob("*.json")):
        row = json.loads(file.read_text())
        for name, value in made_with(config, steps).items():
            require(row.get(name) == value, f"{file}: {name}", row.get(name), f"{value}; give another --out")
        rows.append(row)
    return rows


def questions(config: TrainConfig, seed: int) -> DataConfig:
    """The config's last stage alone, in the order of a seed."""
    last = config.data.stages[-1]
    return replace(config.data, stages=(Stage(0, last.weights),), seed=seed)


def run_row(name: str, seed: int, config: TrainConfig, steps: int, out: Path) -> dict[str, Any]:
    """Train and judge one setting under one seed."""
    began = time.monotonic()
    options = settings(config)
    start = backbone(config, seed, out, options[BASE])
    since_backbone = time.monotonic()
    folder = out / f"{name}-{seed}"
    data = questions(config, seed + 1000)  # others than the backbone saw
    common = made_with(config, steps)
    rate = common["learning_rate"]
    optimizer = replace(config.optimizer, learning_rate=rate, warmup=min(config.optimizer.warmup, steps // 10))
    given = seeded(
        config,
        seed,
        output_dir=str(folder),
        init=FromHF(str(start)),
        model=options[name],
        data=data,
        steps=steps,
        optimizer=optimizer,
    )
    finished(given)
    trained = time.monotonic()
    run = load_run(folder)
    heldout = next(step for step in config.final if isinstance(step, Eval))
    assert isinstance(heldout.data, Synthetic)
    source = replace(heldout.data, seed=seed).build()
    samples = [source[i] for i in range(SAMPLES)]
    shape = BatchShape(64, config.data.tokens, config.data.patches)
    right = ForcedAnswers(run.model, run.processor, run.mesh, shape, ANSWER_TOKENS)(samples)
    return {
        "setting": name,
        "seed": seed,
        "accuracy": float(right.mean()),
        **common,
        **read_of(run, samples[:LOOKED_AT], heldout),
        "train_s": round(trained - since_backbone, 1),
        "backbone_s": round(since_backbone - began, 1),
        "evaluate_s": round(time.monotonic() - trained, 1),
        "where": f"{platform.machine()} CPU, {jax.device_count()} devices, float32, jax {jax.__version__}",
    }


def read_of(run: LoadedRun, samples: Sequence[Sample], heldout: Eval) -> dict[str, Any]:
    """Entries that text queries read, and how many chosen regions lie on the evidence; the right answers are given."""
    prompt = run.processor.encode(samples[0].prompt, add_generation_prompt=True)
    reading = account(prompt.info, run.model.config.text, run.model.options)
    assert reading is not None, "every prompt has a picture"
    found: dict[str, Any] = {
        "entries": reading.entries,
        "visual": reading.visual,
        "reading": dataclasses.asdict(reading),
    }
    if run.model.options.layout.regions is None:
        return found
    subject = ModelSubject(
        run.model, run.processor, run.mesh, BatchShape(64, heldout.tokens, heldout.patches), ANSWER_TOKENS
    )
    answers = [Answer(s.answers[0], tuple(run.processor.tokenizer.encode(s.answers[0]))) for s in samples]
    routes = [route for route in subject.route(samples, answers) if route is not None]
    size = samples[0].images[0].shape[:2][::-1]
    counted = [hits(s, r, relative_box(s.evidence, *size)) for s, r in zip(samples, routes, strict=True) if s.evidence]
    summary = summarise(routes, [one for one in counted if one is not None])
    assert summary is not None and summary.hits is not None
    return {**found, "on_evidence": summary.hits.accuracy, "chance": summary.hits.chance, "by_layer": summary.by_layer}


def compared(rows: Sequence[Mapping[str, Any]], names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each setting: means, the paired difference from the base, what is undecided and what is missing."""
    scores = {name: {r["seed"]: r["accuracy"] for r in rows if r["setting"] == name} for name in names}
    table = []
    for name in names:
        mine = [r for r in rows if r["setting"] == name]
        row: dict[str, Any] = {"setting": name, "missing": [s for s in seeds if s not in scores[name]]}
        if mine:
            row["accuracy"] = statistics.mean(scores[name].values())
            row |= {key: mine[0][key] for key in ("entries", "visual", "samples", "where")}
            row["on_evidence"] = [r["on_evidence"] for r in mine if "on_evidence" in r]
            row["chance"] = [r["chance"] for r in mine if "chance" in r]
            difference = None if name == BASE else paired_difference(scores[name], scores[BASE])
            if difference is not None:
                row["difference"] = difference
                row["undecided"] = undecided(difference, list(scores[BASE].values()), floor=FLOOR, widest=WIDEST)
        table.append(row)
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as it stands in docs/results.md."""
    lines = [
        "| setting | entries of a query | right answers | against dense, points | regions on the evidence | missing |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        missing = "" if not row["missing"] else "seeds " + ", ".join(map(str, row["missing"]))
        if "accuracy" not in row:
            lines.append(f"| {row['setting']} | | | | | {missing} |")
            continue
        gain = "" if "difference" not in row else f"{100 * row['difference'].mean:+.1f}"
        if "difference" in row and row["difference"].seeds > 1:
            gain += f" ({100 * row['difference'].low:+.1f} to {100 * row['difference'].high:+.1f})"
        if row.get("undecided"):
            gain += f", not decided: {row['undecided']}"
        hit = row["on_evidence"]
        seen = f"{statistics.mean(hit):.1%}, by chance {statistics.mean(row['chance']):.1%}" if hit else ""
        read = f"{row['entries']:.0f} of {row['visual']:.0f}"
        lines.append(f"| {row['setting']} | {read} | {row['accuracy']:.1%} | {gain} | {seen} | {missing} |")
    return lines


def as_results(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the common form of benchmarks: differences that decide hold where nothing is lost."""
    results = []
    for row in table:
        if "difference" not in row:
            continue
        difference = row["difference"]
        results.append(
            {
                "name": f"{row['setting']}: right against {BASE}, {difference.seeds} seeds, {row['samples']} samples",
                "where": row["where"],
                "value": round(100 * difference.mean, 2),
                "unit": "points",
                "aim": f"interval above -{100 * LOST:.1f}",
                "holds": None if row["undecided"] else difference.low > -LOST,
                "undecided": row["undecided"],
            }
        )
    return results


def main() -> int:
    """Run what is missing and print the table."""
    config = load_file(CONFIG)
    assert isinstance(config, TrainConfig)
    names = list(settings(config))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=100, help="of each setting, behind the backbone's")
    parser.add_argument("--out", type=Path, default=Path("runs/gaze_results"))
    parser.add_argument("--json", type=Path, help="write the differences here")
    parser.add_argument("--table", action="store_true", help="run nothing, print what there is")
    given = parser.parse_args()
    hosts.start(config.hosts, config.simulated_devices)
    files = given.out / "rows"
    files.mkdir(parents=True, exist_ok=True)
    try:
        kept_rows(files, config, given.steps)
    except ConfigError as error:
        parser.error(str(error))
    for seed in given.seeds:
        for name in () if given.table else given.settings:
            file = files / f"{name}-{seed}.json"
            if file.exists():
                continue
            try:
                row = run_row(name, seed, config, given.steps, given.out)
            except Interrupted as error:
                print(error, file=sys.stderr)
                return 143
            file.write_text(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}: {row['accuracy']:.1%}", flush=True)
    rows = kept_rows(files, config, given.steps)
    table = compared([r for r in rows if r["seed"] in given.seeds], names, given.seeds)
    print("\n".join(markdown(table)))
    if given.json:
        given.json.write_text(json.dumps(as_results(table), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
