"""What a run shows and writes."""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import shutil

import pytest
from rich.console import Console

from rave_jax.observe.messages import plain_messages
from rave_jax.observe.metrics import JsonlWriter, TensorBoardWriter, read_jsonl
from rave_jax.observe.progress import ProgressReport, duration
from rave_jax.observe.tables import GroupRow, print_parameters, size
from rave_jax.observe.waiting import WaitMeter


def test_jsonl_drops_rows_after_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    writer = JsonlWriter(path, after_step=2)
    writer.write(3, {"loss": 1.5})
    # Written out at once: another reader sees it while the writer is open.
    assert [row["loss"] for row in read_jsonl(path)] == [3.0, 2.0, 1.5]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("writer", [JsonlWriter, TensorBoardWriter])
def test_a_disk_that_fills_up_is_an_error_at_once(tmp_path, writer):
    """Files that may not grow stand for it. A writer with a thread of its own would wait for ever."""
    opened = writer(tmp_path / "metrics", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            for step in range(100):
                opened.write(step, {"loss": 1.0, "accuracy": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    opened.close()


def test_a_file_that_was_deleted_is_begun_again_and_a_folder_is_not(tmp_path, caplog):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    writer = JsonlWriter(path, 0)
    writer.write(1, {"loss": 1.0})
    path.unlink()
    writer.write(2, {"loss": 2.0})
    assert read_jsonl(path) == [{"step": 2, "loss": 2.0}]
    assert "metrics.jsonl was deleted; its rows before step 2 are lost" in caplog.text
    shutil.rmtree(path.parent)
    with pytest.raises(FileNotFoundError):
        writer.write(3, {"loss": 3.0})


FOREIGN = [
    b'{"step": 2, "lo',
    b"Traceback (most recent call last):",
    b"[1, 2]",
    b"null",
    b'{"loss": 2.0}',
    b'{"step": "2", "loss": 2.0}',
    b'{"step": true, "loss": 2.0}',
    b'{"step": 2, "loss": "low"}',
    b'{"step": 2, "loss": NaN}',
    b"\xff\xfe\x00",
    b"[" * 200_000,
]


@pytest.mark.parametrize("line", FOREIGN, ids=[repr(line[:24]) for line in FOREIGN])
def test_a_line_that_is_no_row_is_kept_aside_and_costs_no_other(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    before, behind = b'{"step": 1, "loss": 3.0}\n', b'{"step": 3, "loss": null}\n'
    path.write_bytes(before + line + b"\n" + behind)
    assert [row["step"] for row in read_jsonl(path)] == [1, 3]
    assert "metrics.jsonl: 1 line does not hold metrics; the first is line 2: " in caplog.text
    for _ in range(2):  # the second time there is nothing to say
        JsonlWriter(path, after_step=3).close()
    assert path.read_bytes() == before + behind
    assert (tmp_path / "metrics.jsonl.rejected").read_bytes() == line + b"\n"
    assert caplog.text.count("moved to") == 1


def test_a_pipe_in_place_of_the_metrics_is_not_waited_on(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        JsonlWriter(tmp_path / "metrics.jsonl", 0)


def test_a_foreign_end_without_a_newline_is_kept_too(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\nnote to myself')
    JsonlWriter(path, after_step=1).close()
    assert (tmp_path / "metrics.jsonl.rejected").read_text() == "note to myself\n"


def test_a_last_row_without_a_newline_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}')
    JsonlWriter(path, after_step=2).close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    assert path.read_bytes().endswith(b"\n")


def test_jsonl_stays_json_when_a_number_is_not_finite(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 4})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "tokens": 4,
    }


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.9, "1:15"), (3700, "1:01:40"), (-1, "0:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB")])
def test_size(count, text):
    assert size(count) == text


def test_progress_is_plain_lines_without_a_terminal():
    out = io.StringIO()
    with ProgressReport(10, 0, console=Console(file=out, force_terminal=False, width=200)) as progress:
        progress.restart_clock(1)
        progress.update(1, {"loss": 2.5}, line=True)
        progress.update(2, {"loss": 2.4, "accuracy": 0.25, "tokens_per_second": 12345.6}, line=True)
        progress.update(3, {"loss": 2.3}, line=False)
    first, second = out.getvalue().splitlines()
    assert first == "step 1/10  loss 2.5000"
    assert second.startswith("step 2/10  loss 2.4000  accuracy 0.2500  12,346 tokens/s  ")
    assert second.endswith(" left")


def test_progress_is_a_bar_on_a_terminal():
    out = io.StringIO()
    with ProgressReport(10, 5, console=Console(file=out, force_terminal=True, width=100)) as progress:
        progress.update(6, {"loss": 2.5}, line=True)
        progress.say("warning: look here")
    assert "6/10" in out.getvalue()
    assert "loss 2.5000" in out.getvalue()
    assert "warning: look here" in out.getvalue()


def test_waiting_for_data_is_said_once_per_window():
    meter = WaitMeter(window=4, share=0.2)
    quick = [meter.add(waited=0.1, elapsed=1.0) for _ in range(4)]
    slow = [meter.add(waited=0.5, elapsed=1.0) for _ in range(4)]
    assert quick == [None] * 4
    assert slow[:3] == [None] * 3
    assert slow[3] is not None
    assert slow[3].startswith("warning: the last 4 steps waited for data 50% of the time; loading is the bottleneck: ")
    assert all(f"data.{field}" in slow[3] for field in ("workers", "prefetch", "processes"))


def test_it_is_said_less_and_less_often():
    meter = WaitMeter(window=2, share=0.2)
    said = [meter.add(waited=1.0, elapsed=1.0) is not None for _ in range(2 * 120)]
    assert [number // 2 + 1 for number, yes in enumerate(said) if yes] == [1, 10, 100]


def test_warnings_are_their_text_alone(monkeypatch):
    """Whoever set logging up before."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    plain_messages()
    logging.getLogger("rave_jax.some").warning("warning: look here")
    assert out.getvalue() == "warning: look here\n"


def test_parameter_table_adds_up():
    out = io.StringIO()
    rows = [
        GroupRow("gate", "trained", 2, 1000, 4000, 8000, 1e-3, 0.1, 0),
        GroupRow("tower", "frozen", 30, 5000, 10000, 0, 0.0, 0.0, 3),
    ]
    print_parameters(rows, Console(file=out, width=150))
    lines = {line.split()[0]: line.split() for line in out.getvalue().splitlines() if line.strip()}
    assert lines["all"][1:] == ["1,000", "trained", "32", "6,000", "13.7", "KiB", "7.8", "KiB", "3"]
    assert lines["tower"][1:] == ["frozen", "30", "5,000", "9.8", "KiB", "0", "B", "3"]
    assert "0.001" in lines["gate"]
