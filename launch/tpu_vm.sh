#!/usr/bin/env bash
# A slice of TPU VMs as a queued resource, and one training run on all its hosts.
#
#   NAME=rave ZONE=us-west4-a TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite bash launch/tpu_vm.sh create
#   ... bash launch/tpu_vm.sh setup          # copies this repository to every host and sets it up
#   CONFIG=configs/qwen2_5_vl_7b_rave_sft.py OUTPUT=gs://BUCKET/runs/one ... bash launch/tpu_vm.sh run [--field value ...]
#   ... bash launch/tpu_vm.sh delete
#
# `run` again continues the run, on this slice or on the one that is made after a preemption.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}"

on_all_hosts() { # COMMAND
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

action=${1:?create, setup, run or delete}
shift
case $action in
create)
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --accelerator-type "${TYPE:?}" --runtime-version "${VERSION:?}" --spot
    ;;
setup)
    gcloud compute tpus tpu-vm scp --recurse . "$NAME":rave_jax --zone "$ZONE" --worker=all
    on_all_hosts "cd rave_jax && python3.12 bootstrap.py -m pip install --quiet '.[tpu,gcs]'"
    ;;
run)
    printf -v words ' %q' "${CONFIG:?}" --output-dir "${OUTPUT:?}" --hosts.processes -1 "$@"
    on_all_hosts "cd rave_jax && python3.12 bootstrap.py train.py$words"
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force
    ;;
*)
    echo "unknown action $action: create, setup, run or delete" >&2
    exit 2
    ;;
esac
