"""How long a step takes at best, what holds it up, and what a run costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.flops import cache_bytes_per_token, expected_flops_per_token, mean_training_depth
from mythos_ds.costs.params import checkpoint_disk_bytes, count_parameters
from mythos_ds.costs.pipeline import predict
from mythos_ds.costs.reach import planned_dispatch
from mythos_ds.hardware import Gpu
from mythos_ds.plan.activation_trace import Workload
from mythos_ds.plan.device_traffic import micro_batch
from mythos_ds.plan.exchange import exchanged
from mythos_ds.plan.memory import states, workload
from mythos_ds.plan.slots import row_waits
from mythos_ds.plan.traffic import mean_graded_loops, traffic

TARGETS = (0.45, 0.35)
"""Model FLOPs utilisations that runs are also priced at: ambitious, and good."""
EXCHANGE = "dispatch and combine"
_SERVING_SHARE = 0.9
"""Of a GPU's memory that weights and cache may take."""


@dataclass(frozen=True)
class Transfer:
    """Bytes of one kind per GPU and step, over each link, and the seconds they take by themselves."""

    name: str
    node_bytes: float
    network_bytes: float
    seconds: float


@dataclass(frozen=True)
class Timing:
    """A mean step.

    Attributes:
        compute_s: matrix products, recomputed ones included, at the rate that kernels reach.
        memory_s: all other operations of the GPU, at the rate that its memory reaches.
        launch_s: the host's time to launch all of these, hidden behind them where they take longer.
        transfers: what travels.
        idle_share: of a pipeline.
        waits_s: of computation for rows of tokens, in the order in which loops compute and let rows leave.
        bound_s: if everything that travels were hidden behind computation, or the other way round.
        built_s: as built: rows are hidden as `waits_s` says, and nothing else that travels.
        hottest_s: the same where all wait for the hottest rank of each exchange, with `slots.HOTTEST` times the mean of
            rows; None where that is not known.
        tokens_per_step: of all GPUs.
        model_flops: of a step per GPU, without what is recomputed.
    """

    compute_s: float
    memory_s: float
    launch_s: float
    transfers: tuple[Transfer, ...]
    idle_share: float
    waits_s: float
    bound_s: float
    built_s: float
    hottest_s: float | None
    tokens_per_step: int
    model_flops: float
    peak_flops: float

    @property
    def mfu_bound(self) -> float:
        """Model FLOPs utilisation of `bound_s`."""
        return self.model_flops / (self.bound_s * self.peak_flops)

    @property
    def mfu_built(self) -> float:
        """Model FLOPs utilisation of `built_s`."""
        return self.model_flops / (self.built_s * self.peak_flops)

    @property
    def mfu_hottest(self) -> float | None:
        """Model FLOPs utilisation of `hottest_s`."""
        return None if self.hottest_s is None else self.model_flops / (self.hottest_s * self.peak_flops)


def timing(resolved: ResolvedRun, gpu: Gpu) -> Timing:
    """The mean step of a run; of a pipeline the busiest stage."""
    config = resolved.config
    cost = expected_flops_per_token(config, resolved.mean_backprop_depth, resolved.grows_from)
    tokens = resolved.tokens_per_step / resolved.world_size
    loops, graded = mean_training_depth(config, resolved.grows_from), mean_graded_loops(resolved)
    moved = [transfers(resolved, loops, graded, gpu, index) for index in range(len(resolved.stages))]
    busiest = max(moved, key=lambda found: sum(transfer.seconds for transfer in found))
    waits = row_waits(resolved, loops, graded, gpu, moved.index(busiest))
    idle = predict(resolved, config.model.mean_recurrence).bubble if len(resolved.stages) > 1 else 0.0
    network = sum(t.network_bytes for t in busiest) / gpu.network_bandwidth
    node = sum(t.node_bytes for t in busiest) / gpu.node_bandwidth
    compute, memory_s, launch_s = _working(resolved, gpu, workload(resolved))
    busy = max(compute + memory_s, launch_s)
    bound = max(busy, network, node) / (1 - idle)
    bare = sum(t.seconds for t in busiest if t.name != EXCHANGE)
    built = (busy + bare + waits.even) / (1 - idle)
    return Timing(
        compute,
        memory_s,
        launch_s,
        busiest,
        idle,
        waits.even,
        bound,
        built,
        None if waits.hottest is None else built + waits.hottest / (1 - idle),
        resolved.tokens_per_step,
        cost.training * tokens,
        gpu.peak_flops,
    )


def least_seconds(resolved: ResolvedRun, gpu: Gpu) -> float:
    """Computes what a mean step takes at least, as `Timing.built_s`: if no GPU waited for rows, and lanes cost nothing.
    Quicker than `timing`."""
    loops, graded = mean_training_depth(resolved.config, resolved.grows_from), mean_graded_loops(resolved)
    moved = [transfers(resolved, loops, graded, gpu, index) for index in range(len(resolved.stages))]
    bare = min(sum(t.seconds for t in found if t.name != EXCHANGE) for found in moved)
    compute, memory_s, launch_s = _working(resolved, gpu, replace(workload(resolved), overlap=False))
    idle = predict(resolved, resolved.config.model.mean_recurrence).bubble if len(resolved.stages) > 1 else 0.0
    return (max(compute + memory_s, launch_s) + bare) / (1 - idle)


def _working(resolved: ResolvedRun, gpu: Gpu, load: Workload) -> tuple[float, float, float]:
    """What products and attention take in a mean step; what all other operations take, with reading and writing all
    states in the update; and launching all but those of the update. Of a pipeline the mean over its stages."""
    config, tokens = resolved.config, resolved.tokens_per_step / resolved.world_size
    cost = expected_flops_per_token(config, resolved.mean_backprop_depth, resolved.grows_from)
    compute = (cost.training + cost.recompute) * tokens / (gpu.peak_flops * gpu.kernel_share)
    moved = micro_batch(load, mean_training_depth(config, resolved.grows_from), mean_graded_loops(resolved))
    stages = len(resolved.stages)
    update = 0 if resolved.config.parallel.offload_optimizer == "cpu" else 2 * states(resolved).total
    size = moved.token * tokens + moved.once * resolved.gradient_accumulation_steps / stages + update
    launches = moved.launches * resolved.gradient_accumulation_steps / stages
    return compute, size / (gpu.memory_bandwidth * gpu.memory_share), launches * gpu.launch_s


def transfers(resolved: ResolvedRun, loops: float, graded: float, gpu: Gpu, index: int) -> tuple[Transfer, ...]:
    """The traffic of a step of stage `index` over the links of nodes whose GPUs have consecutive ranks.

    A gather over several nodes enters each node once, through the network links of all its GPUs, and is spread inside;
    the processes that hold the same experts lie on different nodes, each with its own link.
    """
    moved = traffic(resolved, loops, index, graded=graded)
    rows = exchanged(resolved, loops, graded, index, gpu.gpus_per_node)
    stage, per_node = resolved.stages[index], gpu.gpus_per_node
    size = stage.size
    nodes = ceil(size / per_node)
    outside = (1 - 1 / nodes) / per_node
    ep_size = resolved.layout(stage.first_rank).ep_size
    copies, near = size // ep_size, max(1, min(per_node, size) // ep_size)
    kinds = (
        ("gather weights", moved.gather, moved.gather * (1 - 1 / size), moved.gather * outside),
        ("gather experts", *_between_copies(moved.gather_experts, copies, near)),
        ("reduce gradients", moved.reduce, moved.reduce * (1 - 1 / size), moved.reduce * outside),
        ("reduce expert gradients", *_between_copies(moved.reduce_experts, copies, near)),
        (EXCHANGE, rows.total, rows.node, rows.network),
        ("ring", moved.ring, *((moved.ring, 0.0) if resolved.world_size <= per_node else (0.0, moved.ring))),
    )
    by_node = planned_dispatch(resolved, per_node).name == "per_node"
    made = []
    for name, total, node, network in kinds:
        links = node / gpu.node_bandwidth, network / gpu.network_bandwidth
        one_after_the_other = by_node and name == EXCHANGE  # first over nodes, then inside
        if total:
            made.append(Transfer(name, node, network, sum(links) if one_after_the_other else max(links)))
    if seconds := _offload_seconds(resolved, gpu, index):
        made.append(Transfer("host memory", 0.0, 0.0, seconds))
    return tuple(made)


def _offload_seconds(resolved: ResolvedRun, gpu: Gpu, index: int) -> float:
    """Gradients to host memory and new weights back in each step, and with the weights there too, these for the forward
    and the backward of each micro-batch. The update's own time on the CPU is not in it."""
    parallel, kept = resolved.config.parallel, states(resolved, index)
    moved = kept.gradients + kept.weights if parallel.offload_optimizer == "cpu" else 0
    if parallel.offload_params == "cpu":
        moved += 2 * resolved.gradient_accumulation_steps * kept.weights
    return moved / gpu.host_bandwidth


def _between_copies(size: float, copies: int, near: int) -> tuple[float, float, float]:
    """`near` of the copies lie in a node; a gather enters the node once, through the links of these."""
    travels = size * (1 - 1 / copies)
    outside = size * (1 - near / copies) / near
    return travels, travels if near > 1 else 0.0, outside


@dataclass(frozen=True)
class Cost:
    """A run at a given utilisation."""

    label: str
    mfu: float
    tokens_per_second: float
    days: float
    days_per_trillion: float
    dollars: float


def costs(found: Timing, gpus: int, gpu: Gpu, tokens: float) -> tuple[Cost, ...]:
    """As built, at the bound, and at each of TARGETS that the bound allows."""
    made = []
    targets = ((f"target {target:.0%}", target) for target in TARGETS)
    for label, mfu in (("as built", found.mfu_built), ("bound", found.mfu_bound), *targets):
        if mfu > found.mfu_bound:
            continue
        step = found.model_flops / (mfu * found.peak_flops)
        rate = found.tokens_per_step / step
        days = tokens / rate / 86400
        made.append(Cost(label, mfu, rate, days, 1e12 / rate / 86400, days * 24 * gpus * gpu.price_per_hour))
    return tuple(made)


def run_costs(stages: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The sums over training stages of what the plan says they cost, at the utilisations that each of them allows."""
    made = []
    for first in stages[0]:
        same = [cost for stage in stages for cost in stage if cost["at"] == first["at"]]
        if len(same) == len(stages):
            sums = {name: sum(cost[name] for cost in same) for name in ("days", "dollars")}
            made.append({"at": first["at"], **sums})
    return made


@dataclass(frozen=True)
class Checkpoint:
    """Bytes, seconds to write, hours between failures, and how often to save (Young 1974)."""

    bytes: float
    write_s: float
    hours_between_failures: float
    interval_s: float


def checkpoint(resolved: ResolvedRun, gpus: int, gpu: Gpu) -> Checkpoint:
    """Saving all states, each node to its file system."""
    size = checkpoint_disk_bytes(resolved.config)
    write = size / (ceil(gpus / gpu.gpus_per_node) * gpu.disk_bandwidth)
    between = 1 / (gpus * gpu.failures_per_hour)
    return Checkpoint(size, write, between, sqrt(2 * write * between * 3600))


@dataclass(frozen=True)
class Serving:
    """The smallest number of whole nodes that holds bf16 weights and a cache, and what the cache then allows."""

    nodes: int
    cache_bytes_mean: int
    cache_bytes_max: int
    largest_context: int
    batch_at_training_length: int


def serving(resolved: ResolvedRun, gpu: Gpu) -> Serving:
    """Exact cache in bf16, one entry per loop and layer, at full depth."""
    model = resolved.config.model
    weights = 2 * count_parameters(model).total
    node = _SERVING_SHARE * gpu.memory_bytes * gpu.gpus_per_node
    per_token = cache_bytes_per_token(model, model.max_loops)
    nodes = ceil((weights + per_token * resolved.config.training.seq_len) / node)
    free = nodes * node - weights
    return Serving(
        nodes,
        cache_bytes_per_token(model, model.mean_recurrence),
        per_token,
        int(free // per_token),
        int(free // (per_token * resolved.config.training.seq_len)),
    )
