"""What the chips of a mesh send each other in a train step, read from what the TPU's compiler makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest


@pytest.fixture(scope="module")
def steps(repo) -> dict[str, Any]:
    """The collectives of a small model's step on two kinds of chips."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.real_collectives"],
        cwd=repo,
        env=os.environ
        | {"PYTHONPATH": str(repo), "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
        | {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


Collective = tuple[str, list[str], int, int, bool]
"""(kind, axes, bytes of the whole array, times, asynchronous)."""


def of(step: dict[str, Any], *kinds: str, axes: str) -> list[Collective]:
    return [one for one in step["collectives"] if one[0] in kinds and one[1] == [axes]]


def sent(collectives: list[Collective]) -> int:
    return sum(size * times for _, _, size, times, _ in collectives)


LAYERS = 2
NORMS = 16 * 1024
"""Bytes of the gradients of norms, biases and gates, at most."""


@pytest.mark.tpu_compiler
def test_gradients_are_summed_onto_their_shards(steps) -> None:
    """Bytes of each weight once: the table in float32, the layers' in the compute type."""
    step = steps["v5e:4x4"]
    table = 4 * 1024 * 256 // 4
    # Query, output and three of the mlp are split over `tensor`; the two kv heads are not, on four ways.
    layer = 2 * (2 * 256 * 256 // 4 + 2 * 128 * 256 + 3 * 512 * 256 // 4)
    assert sent(of(step, "reduce-scatter", axes="fsdp")) == pytest.approx(2 * table + LAYERS * layer, rel=0.05)
    assert sent(of(step, "all-reduce", axes="fsdp")) < NORMS, "none is summed whole on every chip"


@pytest.mark.tpu_compiler
def test_sums_of_a_layer_are_scattered_over_its_tokens(steps) -> None:
    """Those behind attention and the mlp, forward and backward, and that behind attention when it is computed again;
    and beside the layers embedded tokens and the gradient of what enters the head."""
    step, stream = steps["v5e:4x4"], 2 * 8 * 64 * 256
    assert sum(times for _, _, _, times, _ in of(step, "reduce-scatter", axes="tensor")) == 5 * LAYERS + 2
    whole = [times for _, _, size, times, _ in of(step, "all-reduce", axes="tensor") if size >= stream]
    assert whole == []


@pytest.mark.tpu_compiler
def test_the_head_is_gathered_once_in_a_step_and_not_in_every_chunk(steps) -> None:
    """It is the embedding table here, which is gathered in the same place."""
    gathered = 2 * 1024 * 256 // 4
    found = of(steps["v5e:4x4"], "all-gather", axes="fsdp")
    assert [times for _, _, size, times, _ in found if size == gathered] == [1]
    assert max(size for _, _, size, _, _ in found) == gathered


@pytest.mark.tpu_compiler
def test_what_is_large_is_sent_beside_the_work_on_sparse_cores(steps) -> None:
    """With the options of the chip, on v6e: gathers of weights, and sums of gradients."""
    large = [one for one in steps["v6e:4x4"]["collectives"] if one[2] > NORMS and one[0] != "all-to-all"]
    assert len(large) > 10
    assert all(asynchronous for *_, asynchronous in large)
