"""The planner's predictions held against real engines on this machine, layout by layout, and the page about it."""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from mythos_ds.bench.paced_pipeline import idle_share
from mythos_ds.cluster.local_processes import run_processes
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.costs.pipeline import predict
from mythos_ds.errors import ConfigError
from mythos_ds.io import write_atomic
from mythos_ds.monitor.throughput import gpu_name
from mythos_ds.plan.memory import mean_step, stage_memory, states
from mythos_ds.plan.traffic import traffic
from mythos_ds.provenance import describe

_BASE = (
    "model.dim=128", "model.ffn_dim=384", "model.expert_dim=64", "model.n_experts=16", "model.recurrent_layers=2",
    "training.seq_len=128", "training.micro_batch_size=4", "training.grad_clip=1.0",
    "deepspeed.zero_optimization.reduce_bucket_size=1000",
)  # fmt: skip
_LARGE = (
    "deepspeed.zero_optimization.stage3_max_reuse_distance=0",
    "deepspeed.zero_optimization.stage3_prefetch_bucket_size=0",
    "deepspeed.zero_optimization.stage3_max_live_parameters=0",
)
"""Keep DeepSpeed from holding a small model whole, as it cannot hold a large one."""
_RING = ("deepspeed.zero_optimization.stage3_param_persistence_threshold=null",)
_ROWS = ("training.global_batch_size=16", "model.recurrent_layers=2", "training.dtype=bfloat16")
_TWO_NODES = ("cluster.gpu=h100", "cluster.nodes=2", "cluster.gpus_per_node=2")
_LIMIT_S = 300


@dataclass(frozen=True)
class Case:
    """A layout, its processes, the loops of the counted step, and how many processes pretend to share a node."""

    name: str
    processes: int
    settings: tuple[str, ...]
    n_loops: int = 4
    node: int | None = None


CASES = (
    Case("EP 2, ZeRO-3", 2, (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=8")),
    Case("EP 1, ZeRO-3", 2, (*_LARGE, "parallel.ep_size=1", "training.global_batch_size=8")),
    Case("EP 2 x 2 copies, ZeRO-3", 4, (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=16")),
    Case("EP 4, ZeRO-3", 4, (*_LARGE, "parallel.ep_size=4", "training.global_batch_size=16")),
    Case(
        "EP 2, no recomputation", 2,
        (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=8", "parallel.activation_checkpointing=none"),
    ),
    Case(
        "EP 2, by layer", 2,
        (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=8", "parallel.activation_checkpointing=layer"),
    ),
    Case(
        "EP 4, per rank", 4,
        (*_LARGE, "parallel.ep_size=4", "training.global_batch_size=16", "parallel.dispatch=per_rank"),
    ),
    Case(
        "EP 4, per rank, rows in fp8", 4,
        (
            *_LARGE, "parallel.ep_size=4", "training.global_batch_size=16", "parallel.dispatch=per_rank",
            "parallel.dispatch_dtype=fp8",
        ),
    ),
    Case(
        "EP 4 over two nodes, per node", 4,
        (*_LARGE, *_TWO_NODES, "parallel.ep_size=4", "training.global_batch_size=16", "parallel.dispatch=per_node"),
        node=2,
    ),
    Case(
        "EP 2, two lanes", 2,
        (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=8", "parallel.overlap=true"),
    ),
    Case(
        "EP 4 over two nodes, per node, two lanes, by layer", 4,
        (
            *_LARGE, *_TWO_NODES, "parallel.ep_size=4", "training.global_batch_size=16", "parallel.dispatch=per_node",
            "parallel.overlap=true", "parallel.activation_checkpointing=layer",
        ),
        node=2,
    ),
    Case("EP 2, bf16", 2, (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=8", "training.dtype=bfloat16")),
    Case("EP 2, 7 loops", 2, (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=8"), 7),
    Case(
        "EP 2, two micro-batches, gradient through 3 loops", 2,
        (*_LARGE, "parallel.ep_size=2", "training.global_batch_size=16", "training.mean_backprop_depth=3"),
    ),
    Case(
        "ring of 2, EP 2", 4,
        (*_RING, "parallel.ep_size=2", "parallel.pp_size=2", "training.global_batch_size=32"),
    ),
    Case("ring of 2, 8 micro-batches", 2, (*_RING, "parallel.pp_size=2", "training.global_batch_size=32")),
    Case(
        "ring of 2, no recomputation", 2,
        (*_RING, "parallel.pp_size=2", "training.global_batch_size=32", "parallel.activation_checkpointing=none"),
    ),
    Case(
        "ring of 2, by layer", 2,
        (
            *_RING, "parallel.pp_size=2", "training.global_batch_size=32", "parallel.activation_checkpointing=layer",
            "model.recurrent_layers=4",
        ),
    ),
    Case(
        "stages of 1, 2 and 1 processes", 4, (*_RING, "parallel.pp_size=[1,2,1]", "training.global_batch_size=32"),
    ),
)  # fmt: skip

EXCHANGES = (
    Case("EP 2, all to all", 2, (*_ROWS, "parallel.ep_size=2")),
    Case("EP 2, all to all, two lanes", 2, (*_ROWS, "parallel.ep_size=2", "parallel.overlap=true")),
    Case(
        "EP 4, per rank, two lanes, by layer", 4,
        (
            *_ROWS, "parallel.ep_size=4", "parallel.dispatch=per_rank", "parallel.overlap=true",
            "parallel.activation_checkpointing=layer",
        ),
    ),
    Case(
        "EP 4 over two nodes, per node", 4,
        (*_ROWS, *_TWO_NODES, "parallel.ep_size=4", "parallel.dispatch=per_node"), node=2,
    ),
    Case(
        "EP 4 over two nodes, per node, two lanes", 4,
        (*_ROWS, *_TWO_NODES, "parallel.ep_size=4", "parallel.dispatch=per_node", "parallel.overlap=true"), node=2,
    ),
)  # fmt: skip

PIPELINES = (
    Case("ring of 2, 2 micro-batches", 2, (*_RING, "parallel.pp_size=2", "training.global_batch_size=8")),
    Case("ring of 2, 4 micro-batches, 7 loops", 2, (*_RING, "parallel.pp_size=2", "training.global_batch_size=16"), 7),
    Case(
        "ring of 2, EP 2, gradient through all loops", 4,
        (
            *_RING, "parallel.pp_size=2", "parallel.ep_size=2", "training.global_batch_size=16",
            "training.mean_backprop_depth=4",
        ),
    ),
    Case(
        "ring of 4, 4 micro-batches", 4,
        (*_RING, "parallel.pp_size=4", "model.recurrent_layers=4", "training.global_batch_size=16"),
    ),
    Case(
        "stages of 1, 2 and 1 processes, 4 micro-batches", 4,
        (*_RING, "parallel.pp_size=[1,2,1]", "training.global_batch_size=32"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What was predicted and what was counted, for the process on which they differ most. Bytes."""

    layout: str
    states_equal: bool
    memory_predicted: float
    memory_counted: int
    gather_predicted: float
    gather_counted: int
    reduce_predicted: float
    reduce_counted: int
    exchange_predicted: float
    exchange_counted: float
    counts_predicted: float
    counts_counted: int
    ring_predicted: float
    ring_counted: int

    @property
    def memory_error(self) -> float:
        """The prediction over the count, less one."""
        return self.memory_predicted / self.memory_counted - 1


@dataclass(frozen=True)
class Idle:
    """A pipeline's idle share in a step whose computations take their predicted time. `overrun`: seconds by
    which the slowest took longer."""

    layout: str
    predicted: float
    measured: float
    overrun: float


@dataclass(frozen=True)
class MeasuredWaits:
    """A loop's time over that of its work alone, where work and rows take their predicted times. `overrun`: seconds by
    which the slowest took longer."""

    layout: str
    predicted: float
    measured: float
    overrun: float


def measure(case: Case) -> Comparison:
    """Run a case and compare, on the process whose memory is predicted worst."""
    resolved, counted = run_case(case, paced="no")
    # Routing decides how much a process sends; together they send what the formula says.
    exchanged: dict[int, list[float]] = {}
    for found in counted:
        exchanged.setdefault(found["stage"], []).append(found["traffic"].get("all_to_all_single", 0))
    means = {stage: sum(sent) / len(sent) for stage, sent in exchanged.items()}
    rows = [compare(case, resolved, found, means[found["stage"]]) for found in counted]
    return max(rows, key=lambda row: abs(row.memory_error))


def measure_idle(case: Case) -> Idle:
    """Run a pipeline at the pace of its prediction."""
    resolved, found = run_case(case, paced="stages")
    overrun = max(own["overrun"] for own in found)
    return Idle(case.name, predict(resolved, case.n_loops).bubble, idle_share(found), overrun)


def measure_waits(case: Case) -> MeasuredWaits:
    """Run a loop at the pace of its prediction."""
    _, found = run_case(case, paced="rows")
    slowest = max(found, key=lambda own: own["seconds"])
    predicted, measured = (slowest[name] / slowest["work"] for name in ("predicted", "seconds"))
    return MeasuredWaits(case.name, predicted, measured, max(own["overrun"] for own in found))


def run_case(case: Case, *, paced: Literal["no", "stages", "rows"]) -> tuple[ResolvedRun, list[dict[str, Any]]]:
    """The case's run as resolved, and what each of its processes found."""
    overrides = [*_BASE, *case.settings]
    resolved = resolve(load_config("tiny", overrides).config, case.processes)
    task = {"config": "tiny", "overrides": overrides, "n_loops": case.n_loops, "paced": paced, "node": case.node}
    return resolved, _found(task, case.processes)


def compare(case: Case, resolved: ResolvedRun, found: dict[str, Any], exchanged: float) -> Comparison:
    """Prediction and count of one process."""
    stage, moved = found["stage"], found["traffic"]
    kept = asdict(states(resolved, stage))
    predicted = traffic(resolved, case.n_loops, stage)
    return Comparison(
        case.name,
        kept == found["states"],
        stage_memory(resolved, stage, False, mean_step(resolved)).total,
        found["peak"],
        predicted.gather + predicted.gather_experts,
        moved.get("all_gather_into_tensor", 0) + moved.get("all_gather", 0),
        predicted.reduce + predicted.reduce_experts,
        moved.get("reduce_scatter_tensor", 0),
        predicted.exchange,
        exchanged,
        predicted.counts,
        moved.get("all_to_all_single:integers", 0),
        predicted.ring,
        moved.get("isend", 0),
    )


def _found(task: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """What each calibration worker found. Raises ConfigError with what all printed where one failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case.json").write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "mythos_ds.bench.calibration_worker", str(folder / "case.json"), str(folder)]
        variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        code = run_processes(command, processes, variables=variables, logs=folder, limit_s=_LIMIT_S)
        if code:
            logs = [
                (folder / f"rank_{rank}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
                for rank in range(processes)
            ]
            raise ConfigError("\n".join([f"a process of the measured run failed (exit code {code}):", *logs]))
        return [json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def write_calibration(
    output: Path, rows: list[Comparison], pipelines: list[Idle], exchanges: list[MeasuredWaits]
) -> None:
    """The page and its numbers."""
    facts = {"date": date.today().isoformat(), "hardware": describe(gpu_name()), "command": "mythos-ds calibrate"}
    content = {
        **facts,
        "rows": [{**asdict(row), "memory_error": row.memory_error} for row in rows],
        "pipelines": [asdict(idle) for idle in pipelines],
        "exchanges": [asdict(waits) for waits in exchanges],
    }
    write_atomic(output / "calibration.json", json.dumps(content, indent=1) + "\n")
    lines = [
        "| layout | weights, masters, optimizer, gradients | peak memory, counted | predicted | gathered | reduced | "
        "exchanged rows | counts | ring |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        pairs = (
            (row.gather_predicted, row.gather_counted), (row.reduce_predicted, row.reduce_counted),
            (row.exchange_predicted, row.exchange_counted), (row.counts_predicted, row.counts_counted),
            (row.ring_predicted, row.ring_counted),
        )  # fmt: skip
        same = "equal" if row.states_equal else "**different**"
        memory = f"{row.memory_counted:,} | {row.memory_error:+.1%}"
        lines.append(f"| {row.layout} | {same} | {memory} | {' | '.join(_pair(*pair) for pair in pairs)} |")
    idles = ["| pipeline | idle share, measured | predicted | prediction over measurement |", "|---|---:|---:|---:|"]
    for idle in pipelines:
        error = f"{idle.predicted / idle.measured - 1:+.1%}"
        idles.append(f"| {idle.layout} | {idle.measured:.2%} | {idle.predicted:.2%} | {error} |")
    overrun = max((idle.overrun for idle in pipelines), default=0.0)
    heads = "| exchange | loop over its work, measured | predicted | prediction over measurement |"
    loops = [heads, "|---|---:|---:|---:|"]
    for waits in exchanges:
        error = f"{waits.predicted / waits.measured - 1:+.1%}"
        loops.append(f"| {waits.layout} | {waits.measured:.3f} | {waits.predicted:.3f} | {error} |")
    late = max((waits.overrun for waits in exchanges), default=0.0)
    page = _PAGE.format(
        **facts, table="\n".join(lines), pipelines="\n".join(idles), overrun=f"{overrun:.2f}",
        exchanges="\n".join(loops), late=f"{late:.2f}",
    )  # fmt: skip
    write_atomic(output / "calibration.md", page)


def _pair(predicted: float, counted: float) -> str:
    if predicted == counted:
        return f"{counted:,.0f}" if counted else ""
    return f"{counted:,.0f} ({predicted / counted - 1:+.1%})" if counted else f"0 (predicted {predicted:,.0f})"


_PAGE = """# How close are the planner's numbers?

Made by `{command}` on {date}; {hardware}.

A small model (width 128, 16 experts, 2 looped layers, 512 tokens per process) trains three steps with DeepSpeed; in the
third, all tensors alive and all bytes handed to collectives are counted, and stand here beside `mythos-ds plan`'s
prediction for the same configuration, in bytes, for the process whose memory is predicted worst. A figure without a
percentage is equal to the prediction; a percentage is prediction over count.

{table}

* Weights, masters, optimizer state and gradients are the buffers that DeepSpeed's ZeRO-3 keeps, compared one by one.
* Peak memory is the largest sum of live tensors within the step. The prediction runs the model's own code on the meta
  device with tokens spread evenly over the experts; real routing is uneven, and DeepSpeed's small buffers are left out.
* Exchanged rows are the mean over the processes of a stage. With `all_to_all` routing decides how processes share them,
  not how many they are; with the others also how many places a token reaches, which is predicted for even routing.
* `deepspeed.zero_optimization` is set so that DeepSpeed gathers the small model as it would a large one, and the reduce
  bucket is small: its default of 500 million numbers would be most of the memory here.

## Waiting in a pipeline

{pipelines}

A step of the real pipeline, its messages and gathers included. Four processes on two cores wait for cores, which a
cluster's do not; so each forward and backward is computed and then slept out to the time that the prediction gives it
(0.15 s for the shortest; the slowest took {overrun} s longer). What is measured is the schedule: who waits for
whom. Idle is what is left between the first start and the last end, over all processes. Whether computations take times
in proportion to their FLOPs, this does not show.

## Waiting for rows

{exchanges}

A loop of two layers, forward and backward, of real processes with their real dispatchers, on links so fast that all
exchanges last as long as the work: 2.0 is a loop that hides nothing, 1.0 one that hides all. The work between two
events of an exchange is slept out to the time that the plan gives it (4 s in all; the slowest took {late} s longer),
and rows arrive when the plan says, or later where another process is late. Events in another order than the plan's are
refused.

Not calibrated: allocator fragmentation (5 % allowed), device context and communicators (by formula), kernels that
differ on a GPU, and every time: those are bounds from data sheets.
"""
