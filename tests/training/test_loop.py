"""The loop: metrics that read back, resume, a loss that is not a number, signals, and a source that fails."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pytest

from rave_jax.batch import Patches
from rave_jax.checkpoint.retention import Retention
from rave_jax.checkpoint.store import Store, StoreError
from rave_jax.config import ConfigError
from rave_jax.observe.metrics import OF_TIME, JsonlWriter, TensorBoardWriter, read_jsonl
from rave_jax.observe.progress import ProgressReport
from rave_jax.parallel.stopping import EXIT_CODES, Interrupted, StopRequest
from rave_jax.parallel.watchdog import Watchdog
from rave_jax.training import feed
from rave_jax.training.loop import Loop, NonFiniteError, Schedule, StepEvaluations
from rave_jax.training.optimizers import OptimizerConfig
from rave_jax.training.state import TrainState, parameters_of, state_of
from tests.training.small import TEXT, RandomSource, first_state, session_of

ROWS, STEPS = 8, 6


@pytest.fixture(scope="module")
def session():
    return session_of(OptimizerConfig(learning_rate=1e-2, accumulation=2), steps=STEPS, rows=ROWS, config=TEXT)


def run(
    session,
    folder: Path,
    state: TrainState,
    source,
    *,
    save_every: int = 2,
    writers=(),
    watchdog: Watchdog | None = None,
    stop: StopRequest | None = None,
    evaluations: StepEvaluations | None = None,
    keep: int | Retention = 2,
    metric: str | None = None,
) -> TrainState:
    with Store(folder / "checkpoints", keep=keep) as store, stop or StopRequest(poll=0.05) as stop:
        schedule = Schedule(STEPS, log_every=1, save_every=save_every)
        progress = ProgressReport(STEPS, 0, enabled=False)
        loop = Loop(
            session,
            schedule,
            store,
            folder / "bad_step",
            writers,
            progress,
            watchdog or Watchdog(0),
            stop,
            evaluations,
            metric=metric,
        )
        return loop.run(state, source, ROWS, lambda step: f"batch {step}")


def restored(session, folder: Path, step: int | None = None) -> tuple[TrainState, dict]:
    with Store(folder, keep=2) as store:
        step = store.latest if step is None else step
        target = parameters_of(session.state)
        parameters, optimizer, data = store.restore(step, target, session.state.optimizer)
        return state_of(parameters, optimizer, session.state), data


def without_time(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in OF_TIME} for row in rows]


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars of event files, by name and step. A record is length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in sorted(directory.glob("events.*"), key=lambda f: f.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_metrics_read_back_and_a_resumed_run_reads_as_one(session, tmp_path):
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    writers = [JsonlWriter(unbroken / "metrics.jsonl", 0), TensorBoardWriter(unbroken / "events", 0)]
    run(session, unbroken, first_state(session, TEXT), RandomSource(ROWS, patches=0), writers=writers)
    for writer in writers:
        writer.close()
    rows = read_jsonl(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "tokens", "target_tokens", "fill"} < set(rows[0])
    on_accelerators = {"mfu", "hbm_gib", "hbm_share"}
    assert set(OF_TIME) - on_accelerators < set(rows[0])
    assert all(0 <= row["waited_for_data"] <= 1 for row in rows)
    events = scalars(unbroken / "events")
    for name in ("loss", "learning_rate", "grad_norm"):
        np.testing.assert_allclose([events[name][row["step"]] for row in rows], [row[name] for row in rows], rtol=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"] or np.isfinite(rows[-1]["loss"])

    # As after a kill: the newest checkpoint is of step 4, the metrics go on to step 5 and end in half a line.
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = (unbroken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    state, data = restored(session, unbroken / "checkpoints", 4)
    assert data == {"step": 4}
    writer = JsonlWriter(broken / "metrics.jsonl", 4)
    resumed = run(session, broken, state, RandomSource(ROWS, patches=0), writers=[writer])
    writer.close()
    assert without_time(read_jsonl(broken / "metrics.jsonl")) == without_time(rows)
    last, _ = restored(session, unbroken / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, resumed, last)


@pytest.mark.parametrize("largest", [False, True])
def test_the_best_is_kept_by_the_metric_of_its_step(session, tmp_path, largest):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    source, keep = RandomSource(ROWS, patches=0), Retention(1, best=1, largest=largest)
    run(session, tmp_path, first_state(session, TEXT), source, save_every=1, writers=[writer], keep=keep, metric="loss")
    losses = {row["step"]: row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")}
    best = (max if largest else min)(losses, key=losses.__getitem__)
    with Store(tmp_path / "checkpoints", keep=1, reader=True) as store:
        assert store.steps == sorted({best, STEPS})


def test_a_loss_that_is_no_number_stops_with_the_state_before_it(session, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 4: loss is (nan|inf).*data: batch 3; the state before.*bad_step/3"):
        run(session, tmp_path, first_state(session, TEXT), RandomSource(ROWS, poison=3, patches=0), save_every=3)
    saved, data = restored(session, tmp_path / "bad_step")
    before, _ = restored(session, tmp_path / "checkpoints")
    assert saved.step == before.step == data["step"] == 3
    jax.tree.map(np.testing.assert_array_equal, saved, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_stops(session, tmp_path, name):
    class Signalling(RandomSource):
        def state(self, step):
            if step == 3:
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(0.5)  # a busy machine would run the few steps before the signal is heard
            return super().state(step)

    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Interrupted, match=rf"{name}: stopped after step \d, which is saved") as stopped:
        run(session, tmp_path, first_state(session, TEXT), Signalling(ROWS, patches=0), save_every=100)
    assert stopped.value.exit_code == EXIT_CODES[name]
    assert signal.getsignal(getattr(signal, name)) == before
    state, data = restored(session, tmp_path / "checkpoints")
    assert 1 <= state.step < STEPS
    assert data == {"step": state.step}


def test_a_signal_while_data_is_waited_for_saves_the_last_finished_step(session, tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "LEAVE", 0.1)
    release = threading.Event()

    class Hanging(RandomSource):
        def load(self, step, start, stop):
            if step == 2:
                threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
                release.wait()
            return super().load(step, start, stop)

    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 2, which is saved"):
        run(session, tmp_path, first_state(session, TEXT), Hanging(ROWS, patches=0), save_every=100)
    release.set()
    state, data = restored(session, tmp_path / "checkpoints")
    assert state.step == 2
    assert data == {"step": 2}


class Panic(BaseException):
    """What a panic in a library written in Rust becomes in Python: no Exception."""


@pytest.mark.parametrize("kind", [OSError, Panic])
def test_what_the_source_raises_reaches_the_caller(session, tmp_path, kind):
    class Failing(RandomSource):
        def load(self, step, start, stop):
            if step == 1:
                raise kind("broken.jpg cannot be read")
            return super().load(step, start, stop)

    with pytest.raises(kind, match=r"broken\.jpg"):
        run(session, tmp_path, first_state(session, TEXT), Failing(ROWS, patches=0))


def test_a_step_that_compiles_has_the_time_of_the_first(session, tmp_path):
    class Growing(RandomSource):
        def load(self, step, start, stop):
            rows = super().load(step, start, stop)
            most = 8 if step in (2, 3) else None
            patches = Patches(*(x[:, :most] for x in rows.batch.patches))
            return rows._replace(batch=rows.batch._replace(patches=patches))

    class Noting(Watchdog):
        given: ClassVar[list[tuple[str, float]]] = []

        def during(self, what, times=1, advice="", *, save=False):
            self.given.append((what, times))
            return super().during(what, times, advice, save=save)

    batch = RandomSource(ROWS, patches=0).load(0, 0, ROWS).batch
    same = replace(session, step=lambda state, _: session.step(state, batch))  # rows of 8 patches are not compiled here
    run(same, tmp_path, first_state(session, TEXT), Growing(ROWS), save_every=100, watchdog=Noting(0))
    compiled = {what for what, times in Noting.given if what.endswith("which is compiled") and times == Watchdog.LONG}
    assert compiled == {"step 1, which is compiled", "step 3, which is compiled"}
    named = {what for what, _ in Noting.given}
    assert named >= {f"step {n}" for n in range(1, STEPS + 1)} | {
        f"the data of step {n}: batch {n - 1}" for n in (1, 6)
    }
    assert f"the checkpoint of step {STEPS}" in named


class Evaluations:
    """One after each second step, that does what a test says."""

    def __init__(self, work):
        self._work, self.ran = work, []

    def due(self, step):
        return step > 0 and step % 2 == 0

    def run(self, step, model, check, say, write):
        self.ran.append(step)
        check()
        self._work(step, model, check, write)


def test_an_evaluation_sees_the_weights_of_its_step_and_its_time_is_not_training(session, tmp_path, monkeypatch):
    """Also after the last step, and after the one that a run continues from."""
    seen, hours = {}, [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * hours[0])
    monkeypatch.setattr("rave_jax.training.loop.time", clock)

    def look(step, model, check, write):
        seen[step] = {name: np.asarray(x) for name, x in session.graph.split(model).items()}
        hours[0] += 1
        write({"eval/a/score": 0.5})

    writer, evaluations = JsonlWriter(tmp_path / "metrics.jsonl", 0), Evaluations(look)
    args = {"writers": [writer], "evaluations": evaluations}
    run(session, tmp_path, first_state(session, TEXT), RandomSource(ROWS, patches=0), **args)
    assert evaluations.ran == [2, 4, 6]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("eval/a/score") == 0.5 and "loss" not in row] == [2, 4, 6]
    rates = {row["step"]: row["tokens"] / row["tokens_per_second"] for row in rows if "loss" in row}
    assert max(rates.values()) < 1800, "seconds of a step, without the hour of the evaluation before it"
    for step in (4, 6):
        state, _ = restored(session, tmp_path / "checkpoints", step)
        jax.tree.map(np.testing.assert_array_equal, seen[step], parameters_of(state)["values"])
    state, _ = restored(session, tmp_path / "checkpoints", 4)
    again = Evaluations(lambda *_: None)
    run(session, tmp_path / "again", state, RandomSource(ROWS, patches=0), evaluations=again)
    assert again.ran == [4, 6]


def test_an_evaluation_that_cannot_go_on_ends_the_run_with_its_state_saved(session, tmp_path):
    def fail(step, model, check, write):
        raise ConfigError("no sample could be asked")

    with pytest.raises(ConfigError, match="no sample could be asked"):
        run(
            session,
            tmp_path,
            first_state(session, TEXT),
            RandomSource(ROWS, patches=0),
            save_every=100,
            evaluations=Evaluations(fail),
        )
    state, data = restored(session, tmp_path / "checkpoints")
    assert state.step == 2 and data == {"step": 2}


def test_a_signal_during_an_evaluation_ends_it_and_saves(session, tmp_path):
    """Also before the first step of a run that continues, where nothing is to be saved."""
    went_on = []

    def work(step, model, check, write):
        os.kill(os.getpid(), signal.SIGTERM)
        for n in range(1000):
            threading.Event().wait(0.01)
            check()
            went_on.append(n)

    source, evaluations = RandomSource(ROWS, patches=0), Evaluations(work)
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 2, which is saved"):
        run(session, tmp_path, first_state(session, TEXT), source, save_every=100, evaluations=evaluations)
    assert evaluations.ran == [2] and len(went_on) < 900
    state, data = restored(session, tmp_path / "checkpoints")
    assert state.step == 2 and data == {"step": 2}
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 2, which is saved"):
        run(session, tmp_path / "again", state, source, save_every=100, evaluations=evaluations)
    assert evaluations.ran == [2, 2] and len(went_on) < 900
    assert not list((tmp_path / "again").glob("checkpoints/*"))


def test_metrics_that_cannot_be_written_end_the_run_with_the_step_that_is_saved(session, tmp_path):
    class Full:
        def write(self, step, values):
            if step == 4:
                raise OSError(28, "No space left on device", "metrics.jsonl")

        def close(self):
            """Nothing is open."""

    expected = (
        r"metrics of step 4 could not be written to metrics.jsonl: No space left on device; the last step that is"
    )
    with pytest.raises(StoreError, match=rf"{expected} saved is 3, and the same command continues after it"):
        run(
            session, tmp_path, first_state(session, TEXT), RandomSource(ROWS, patches=0), save_every=3, writers=[Full()]
        )
