"""Two processes: rows go by shard and not by process, and processes meet. What they train is of slow tests."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.distributed.jobs import PROCESSES, run_job
from tests.distributed.meeting import MESHES, ROWS, weighed
from tests.distributed.worker import STEPS, session_on
from tests.training.small import LENGTH, TEXT, first_state, random_batch, run_steps


@pytest.fixture(scope="module")
def met(tmp_path_factory, repo):
    """What each process saw of a job that trains nothing."""
    folder = tmp_path_factory.mktemp("job")
    run_job(repo, "tests.distributed.meeting", folder)
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(PROCESSES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, repo):
    """What each process saw of a job that trains."""
    folder = tmp_path_factory.mktemp("job")
    run_job(repo, "tests.distributed.worker", folder)
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone():
    """Losses of one process with one device."""
    session = session_on(make_mesh(MeshConfig(), jax.devices()[:1]))
    return [metrics.loss for metrics in run_steps(session, first_state(session, TEXT), range(STEPS), ROWS, 0)[1]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_process(results, alone, mesh):
    for result in results:
        np.testing.assert_allclose([loss for _, loss, _ in result[mesh]["losses"]], alone, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_processes_agree(results, mesh):
    first, second = (result[mesh] for result in results)
    assert first["shapes"] == second["shapes"] == [[ROWS, LENGTH]] * STEPS
    assert first["losses"] == second["losses"]
    assert first["digest"] == second["digest"]


def test_rows_follow_the_shards(met):
    rows = {name: [result[name]["rows"] for result in met] for name in MESHES}
    assert rows["fsdp"] == [[[0, 2], [2, 4]], [[4, 6], [6, 8]]]
    # Tensor parallelism across processes: both hold every row, and each must load it.
    assert rows["tensor"] == [[[0, 8]], [[0, 8]]]
    # Whoever loads them, they make the batch of one process.
    number = int(weighed(random_batch(0, ROWS, patches=0)))
    assert all(result[name]["number"] == number for result in met for name in MESHES)


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(results):
    for result in results:
        whole, continued = result["fsdp"]["losses"], result["restored"]["losses"]
        assert [step for step, _, _ in continued] == [3, 4]
        np.testing.assert_allclose([row[1] for row in continued], [row[1] for row in whole[2:]], rtol=1e-6)


def test_a_barrier_gives_up_and_says_which(met):
    message, seconds = met[0]["barrier"]
    assert message == "barrier 'lonely': not all 2 processes came in 1 s"
    assert seconds < 30


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_while_the_other_waits_for_data(results):
    """Process 0 gets it and has begun a step for which the data of process 1 never comes. More in test_stopping.py."""
    first, second = (result["stopped"] for result in results)
    assert first["message"] == "SIGTERM: stopped after step 3, which is saved; the same command continues"
    assert second["message"] == "SIGTERM at process 0: stopped after step 3, which is saved; the same command continues"
    assert first["code"] == second["code"] == 143
    assert first["saved"] == second["saved"] == [3]
    assert first["data"] == second["data"] == {"step": 3}
    assert first["digest"] == second["digest"]


def test_configs_that_differ_are_refused_on_every_process(met):
    for result in met:
        differs, set_aside = result["config"]
        assert differs.startswith("process 1 has another config than process 0: fsdp is 1, on process 0 2; tensor is")
        assert set_aside == ""


def test_a_directory_that_not_all_see_is_said_on_every_process(met):
    for process, result in enumerate(met):
        together, apart = result["shared"]
        assert together == "", "nothing is said, and nothing is left behind"
        assert "output_dir is '" in apart and f"of process {process}'" in apart
        assert "which process 1 (on " in apart and "and process 0 (on " in apart
        assert apart.endswith("all processes need one file system that every host has mounted, such as NFS")
