"""Launch recipes are whole: their files parse, their commands are ones that train.py takes, and SLURM's runs."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from rave_jax.command_line import load_command_line
from rave_jax.observe.metrics import read_jsonl
from rave_jax.tools.job import EXIT_CONFIG
from rave_jax.training.config import TrainConfig
from tests import programs

BEHIND = {"CONFIG": "configs/qwen2_5_vl_7b_rave_sft.py", "OUTPUT": "gs://bucket/runs/one"}


def taken(repo, words: list[str]) -> TrainConfig:
    """The config that a recipe's words behind train.py make."""
    return load_command_line(TrainConfig, [str(repo / words[0]), *words[1:]], "train.py")


@pytest.mark.parametrize("name", ["slurm.sh", "tpu_vm.sh"])
def test_scripts_parse(repo, name):
    subprocess.run(["bash", "-n", str(repo / "launch" / name)], check=True)


def test_jobset(repo):
    jobset = yaml.safe_load((repo / "launch" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    (part,) = jobset["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["completions"] == job["parallelism"]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    python, program, *words = container["command"]
    assert (python, program) == ("python", "train.py")
    config = taken(repo, words)
    assert config.hosts.processes == -1 and config.output_dir.startswith("gs://")
    assert pod["terminationGracePeriodSeconds"] > config.hosts.stop_timeout
    policy = jobset["spec"]["failurePolicy"]
    (ends,), (rule,) = policy["rules"], job["podFailurePolicy"]["rules"]
    assert policy["maxRestarts"] > 0 and pod["restartPolicy"] == "Never"  # the rules ask for the latter
    assert (ends["action"], ends["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [EXIT_CONFIG]}


def test_slurm_gives_a_run_the_time_to_save(repo):
    text = (repo / "launch" / "slurm.sh").read_text()
    (command,) = re.findall(r"^srun .*$", text, re.M)
    words = shlex.split(re.sub(r"\$\{(\w+):\?\}", lambda found: BEHIND[found[1]], command).replace('"$@"', ""))
    config = taken(repo, words[words.index("train.py") + 1 :])
    assert config.hosts.processes == -1
    assert int(re.findall(r"--signal=TERM@(\d+)", text)[0]) > config.hosts.stop_timeout


def test_what_runs_on_the_hosts_of_a_tpu(repo, tmp_path):
    """A stand-in for gcloud prints what it is asked for."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    gcloud.chmod(0o755)
    there = os.environ | BEHIND | {"NAME": "a", "ZONE": "b", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(repo / "launch" / "tpu_vm.sh"), "run", "--steps", "777"]
    asked = subprocess.run(script, env=there, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "--worker=all" in asked
    words = shlex.split(asked[asked.index("--command") + 1])
    config = taken(repo, words[words.index("train.py") + 1 :])
    assert (config.steps, config.hosts.processes, config.output_dir) == (777, -1, BEHIND["OUTPUT"])


@pytest.mark.slow
def test_slurm_runs_with_a_stand_in_for_srun(repo, tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    path = f"{repo / 'tests' / 'launch'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    there = programs.environment(PATH=path, CONFIG="tests/resume/small_run.py", OUTPUT=str(tmp_path / "run"))
    script = ["bash", "launch/slurm.sh", "--simulated-devices", "2", "--steps", "4"]
    done = subprocess.run(script, cwd=repo, env=there, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "4 devices" in done.stderr or "fsdp 4" in done.stderr
