#!/usr/bin/env bash
# One training run on several nodes of a SLURM cluster, one process for each GPU.
#
#   CONFIG=configs/qwen2_5_vl_7b_rave_sft.py OUTPUT=/shared/runs/one sbatch launch/slurm.sh [--field value ...]
#
# SLURM sends SIGTERM five minutes before the time is over, and when it preempts the job: the run saves and ends, and is
# put back into the queue, where the same command continues it.
#SBATCH --job-name=rave_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@330
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -uo pipefail

# OUTPUT has to be on a file system that all nodes share, or gs://BUCKET/FOLDER.
srun --kill-on-bad-exit=1 python train.py "${CONFIG:?}" --output-dir "${OUTPUT:?}" --hosts.processes -1 "$@"
code=$?
# 143 after SIGTERM, 75 after a hang, 1 after a process died: the run can go on. 2: the config has to be mended.
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
