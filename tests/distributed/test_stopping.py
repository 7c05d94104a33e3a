"""Two processes that are told to end save the same state, whichever gets the signal and whatever they wait for."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.distributed.jobs import run_job
from tests.distributed.stopping import CASES, HANG, STEPS
from tests.distributed.worker import ROWS, session_on
from tests.training.small import TEXT, first_state, run_steps

# Seven jobs of two processes, each with a checkpoint written and read.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory, repo):
    """What each process saw of each case."""
    folder = tmp_path_factory.mktemp("job")
    run_job(repo, "tests.distributed.stopping", folder)
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_both_save_the_same_and_end_in_time(results, name):
    first, second = (result[name] for result in results)
    case = CASES[name]
    code = {"SIGTERM": 143, "SIGINT": 130, "": 75}[case.signal]
    assert first["code"] == second["code"] == code
    assert first["saved"] == second["saved"]
    assert first.get("digest") == second.get("digest")
    assert max(first["seconds"], second["seconds"]) < 60
    if case.signal:
        told, heard = (first, second) if case.to == 0 else (second, first)
        assert told["message"].startswith(f"{case.signal}: stopped")
        assert heard["message"].startswith(f"{case.signal} at process {case.to}: stopped")
    else:
        assert second["message"].startswith("waited ")
        assert first["message"].startswith("process 1: waited "), "the process that hangs is named"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hangs and case.at])
def test_what_is_saved_is_the_last_finished_step(results, name):
    """Also where one process had begun a step for which the data of the other never came."""
    for result in results:
        assert result[name]["saved"] == [result[name]["step"]] == [HANG]
        assert result[name]["data"] == {"step": HANG}
        assert f"stopped after step {HANG}, which is saved" in result[name]["message"]


def test_the_numbers_are_those_of_one_process(results):
    session = session_on(make_mesh(MeshConfig(), jax.devices()[:1]), steps=STEPS)
    state, _ = run_steps(session, first_state(session, TEXT), range(HANG), ROWS, 0)
    whole = float(sum(np.abs(np.asarray(x)).sum() for x in jax.tree.leaves(state.trained)))
    for result in results:
        for name, case in CASES.items():
            if case.hangs and case.at:
                np.testing.assert_allclose(result[name]["sum"], whole, rtol=1e-5, err_msg=name)


def test_before_the_first_step_there_is_nothing_to_save(results):
    for result in results:
        found = result["before the first batch"]
        assert found["saved"] == []
        assert found["message"].endswith("stopped before the first step; the same command starts again")
