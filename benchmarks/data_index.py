"""Opening sources of many records: the first time, when the index is made, and the second; memory; reads at random.

Each file is made of synthetic questions with short answers, and opened by a process of its own:

    first      seconds to open a source whose index is not there yet
    second     seconds to open it again, in a new process
    appended   seconds to open a JSON Lines file to which a thousandth of its records was appended
    memory     most host memory of those processes, MB (resident set)
    reads      samples per second at random places, one thread

Memory has to stay flat: at most 1 GB for 10 million records. Files are deleted at the end.

    python benchmarks/data_index.py [--json FILE] [--records 10000000] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rave_jax.data.sources import HfParquet, QaJsonl

GROUP = 10_000
"""Rows of a parquet row group, as HuggingFace's writers have for texts."""
SHARDS = 10
READS = 2000
MOST_MB = 1024


WORDS = " ".join(f"{n * 40503 % 99991:05}" for n in range(99991))


def text(number: int) -> str:
    """A question of about 230 bytes."""
    first = number * 7919 % (len(WORDS) - 220)
    return f"What follows {WORDS[first : first + 210]}?"


def write_lines(path: Path, first: int, count: int) -> None:
    """Append records to a JSON Lines file."""
    with path.open("a", buffering=2**20) as file:
        for n in range(first, first + count):
            file.write(f'{{"id": "q{n}", "question": "{text(n)}", "answer": "{n}"}}\n')


def write_parquet(folder: Path, count: int) -> None:
    """Records in shards, a row group at a time."""
    folder.mkdir()
    each = count // SHARDS
    for shard in range(SHARDS):
        writer = None
        for first in range(shard * each, (shard + 1) * each, GROUP):
            numbers = range(first, min(first + GROUP, (shard + 1) * each))
            names = [str(n) for n in numbers]
            table = pa.table({"id": names, "question": [text(n) for n in numbers], "answer": names})
            writer = writer or pq.ParquetWriter(folder / f"{shard:02}.parquet", table.schema)
            writer.write_table(table)
        if writer:
            writer.close()


def open_source(path: Path, reads: int) -> dict[str, float]:
    """Open a source in this process, read samples at random, and say what it took."""
    started = time.perf_counter()
    source = (HfParquet if path.is_dir() else QaJsonl)(str(path)).build()
    length, found = len(source), source.fingerprint
    opened = time.perf_counter() - started
    assert found and length
    draw = random.Random(0)
    started = time.perf_counter()
    for _ in range(reads):
        source[draw.randrange(length)]
    rate = reads / (time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"records": length, "seconds": opened, "reads_per_second": rate, "memory_mb": memory}


def in_process(path: Path, reads: int) -> dict[str, float]:
    """`open_source` in a process of its own, whose memory is that of this source alone."""
    command = [sys.executable, __file__, "--open", str(path), "--reads", str(reads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(path: Path, size: int) -> dict[str, Any]:
    """A row of the table."""
    first, second = in_process(path, 0), in_process(path, READS)
    return {
        "source": path.name,
        "records": first["records"],
        "gigabytes": round(size / 1e9, 2),
        "first_s": round(first["seconds"], 2),
        "second_s": round(second["seconds"], 2),
        "memory_mb": round(max(first["memory_mb"], second["memory_mb"])),
        "reads_per_second": round(second["reads_per_second"]),
    }


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--records", type=int, default=10_000_000, help="of each kind of file (default: 10 million)")
    parser.add_argument("--folder", type=Path, help="where files are made and deleted (default: a temporary folder)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reads", type=int, default=READS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_source(args.open, args.reads)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        lines = Path(folder) / "questions.jsonl"
        write_lines(lines, 0, args.records)
        rows.append(measure(lines, lines.stat().st_size))
        write_lines(lines, args.records, max(1, args.records // 1000))
        rows[-1]["appended_s"] = round(in_process(lines, 0)["seconds"], 2)
        print(rows[-1], flush=True)
        lines.unlink()
        shards = Path(folder) / "questions"
        write_parquet(shards, args.records)
        rows.append(measure(shards, sum(file.stat().st_size for file in shards.glob("*.parquet"))))
        print(rows[-1], flush=True)
    for row in rows:
        assert row["memory_mb"] <= MOST_MB, f"{row['source']}: {row['memory_mb']} MB, expected at most {MOST_MB}"
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
