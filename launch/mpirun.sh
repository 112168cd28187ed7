#!/bin/bash
# Train with Open MPI: one process per slot. Needs ssh (or a scheduler that mpirun knows), but not DeepSpeed's launcher.
#
#   MASTER_ADDR=node0 HOSTFILE=hosts launch/mpirun.sh --config 10b.json             # hosts: "node0 slots=8" a line
#   NPROC=2 DS_ACCELERATOR=cpu launch/mpirun.sh --config tiny.json                  # two CPU processes here
#   MASTER_ADDR=node0 HOSTFILE=hosts VERB=preflight launch/mpirun.sh --config 10b.json
#
# MASTER_ADDR: the host of rank 0, the first of HOSTFILE. MPIRUN_FLAGS: more flags for mpirun. VERB: of mythos-ds, or
# PROGRAM: a script, instead of training.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
flags=()
[[ -n "${HOSTFILE:-}" ]] && flags+=(--hostfile "$HOSTFILE")
[[ -n "${NPROC:-}" ]] && flags+=(-n "$NPROC")
for name in MASTER_ADDR MASTER_PORT DS_ACCELERATOR PYTHONPATH $(training_environment | cut -d= -f1); do
  [[ -n "${!name:-}" ]] && flags+=(-x "$name")
done
program=(-m mythos_ds "${VERB:-pretrain}")
[[ -n "${PROGRAM:-}" ]] && program=("$PROGRAM")
# Every rank reads its place from OMPI_COMM_WORLD_*. MPI's own processor binding would put all threads on one core.
# shellcheck disable=SC2086
exec mpirun "${flags[@]}" --bind-to none ${MPIRUN_FLAGS:-} "${PYTHON:-python}" "${program[@]}" "$@"
