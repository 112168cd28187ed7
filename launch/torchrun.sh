#!/bin/bash
# Train with torchrun on one or more nodes. Run the same line on every node.
#
#   launch/torchrun.sh --config 1b.json                                             # one node, all its GPUs
#   NNODES=4 MASTER_ADDR=node0 launch/torchrun.sh --config 10b.json                 # on each of four nodes
#   NPROC=2 DS_ACCELERATOR=cpu launch/torchrun.sh --config tiny.json                # two CPU processes
#   NNODES=4 MASTER_ADDR=node0 VERB=preflight launch/torchrun.sh --config 10b.json
#
# NPROC processes per node (default: one per GPU), NNODES nodes, MASTER_ADDR:MASTER_PORT a host and a free port of one of
# them, RUN_ID a name all nodes share, VERB of mythos-ds (or PROGRAM, a script) instead of training. NODE_RANK (a Kubernetes Job's JOB_COMPLETION_INDEX) fixes the order of the nodes;
# MASTER_ADDR is then node 0. The run directory and data.data_dir must lie on shared storage.
#
# Exit code 0: trained to the end; 75: stopped by a signal with a checkpoint, start it again; 2: wrong configuration.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
. launch/environment.sh
. launch/supervise.sh
python="${PYTHON:-python}" verb="${VERB:-pretrain}"
program=(-m mythos_ds "$verb")
[[ -n "${PROGRAM:-}" && "${PROGRAM##*/}" != pretrain.py ]] && verb="" program=("$PROGRAM")
node="${NODE_RANK:-${JOB_COMPLETION_INDEX:-}}"

processes="${NPROC:-gpu}"
[[ "$processes" == gpu ]] && processes="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$verb" == pretrain && "$processes" -gt 0 ]]; then
  # torchrun turns every failure into exit code 1; a wrong configuration is told before it starts.
  "$python" "${program[@]}" "$@" --dry-run --world-size "$((${NNODES:-1} * processes))" > /dev/null || exit $?
fi
port="${MASTER_PORT:-29400}"
[[ "${NNODES:-1}" == 1 && -z "${MASTER_PORT:-}${MASTER_ADDR:-}$node" ]] && port=0 # any that is free
if [[ "$port" != 0 && ( "${NNODES:-1}" == 1 || "$node" == 0 ) ]]; then
  # This node listens. Where another program does, torchrun waits for minutes and does not say why.
  "$python" -c 'import sys; from mythos_ds.ports import taken; sys.exit(taken(sys.argv[1]))' "$port" || exit 2
fi
if [[ -n "$node" ]]; then
  meet=(--node_rank "$node" --master_addr "${MASTER_ADDR:-localhost}" --master_port "$port")
else
  meet=(--rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-localhost}:$port" --rdzv_id "${RUN_ID:-mythos}")
fi
# torchrun passes SIGTERM on to its processes, and no other signal.
supervise 'kill -TERM $child' "$python" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --nproc_per_node "${NPROC:-gpu}" "${meet[@]}" "${program[@]}" "$@"
code=$?
if [[ "$verb" == pretrain && ( "$code" == 0 || "$stopped" == 1 ) ]]; then
  exec "$python" -m mythos_ds finished "$@" --world-size "$((${NNODES:-1} * processes))"
fi
exit "$code"
