#!/bin/bash
# Train with torchrun on one or more nodes. Run the same line on every node.
#
#   launch/torchrun.sh --config 1b.json                                             # one node, all its GPUs
#   NNODES=4 MASTER_ADDR=node0 launch/torchrun.sh --config 10b.json                 # on each of four nodes
#   NPROC=2 DS_ACCELERATOR=cpu launch/torchrun.sh --config tiny.json                # two CPU processes
#
# NPROC processes per node (default: one per GPU), NNODES nodes, MASTER_ADDR:MASTER_PORT a host and a free port of one of
# them, RUN_ID a name all nodes share. The run directory and data.data_dir must lie on shared storage.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" \
  --nproc_per_node "${NPROC:-gpu}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29400}" \
  --rdzv_id "${RUN_ID:-mythos}" \
  launch/pretrain.py "$@"
