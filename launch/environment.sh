# Environment of every training process. Part of torchrun.sh, mpirun.sh and slurm.sbatch; a value that is already set
# stays. DeepSpeed's launcher takes a file instead, which this one writes when it is run:
#
#   bash launch/environment.sh > .deepspeed_env
#
# INTERFACE=name: the network between the nodes, where a node has several.

# Threads of one process's CPU operators. More than cores / GPUs of a node slows all of them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# Messages appear when they are written, also those of a process that dies; and a crash in C++ shows where Python was.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# Compiled operators lie on each node's own disk: a lock that a killed process leaves in a shared folder hangs the next.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-/tmp/torch_extensions_$(id -u)}"

# NCCL's errors and warnings; INFO shows the transports that it chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# The last collectives of every rank, which torch writes to a file when one times out: they tell who was missing.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Seconds that torchrun leaves its processes for the step and the checkpoint after SIGTERM. torch's own value is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"

# The interface that NCCL's and gloo's sockets use; without it they take the first that is up.
if [[ -n "${INTERFACE:-}" ]]; then
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$INTERFACE}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$INTERFACE}"
fi

training_environment() {
  env | grep -E '^(OMP_NUM_THREADS|PYTHON(UNBUFFERED|FAULTHANDLER)|PYTORCH_((CUDA|HIP)_)?ALLOC_CONF|TORCH_.*|NCCL_.*|GLOO_.*|DS_ACCELERATOR)=' \
    | sort
}
if [[ "${BASH_SOURCE[0]##*/}" == environment.sh && "${BASH_SOURCE[0]}" == "$0" ]]; then training_environment; fi
