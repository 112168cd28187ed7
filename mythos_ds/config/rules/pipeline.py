"""Rules of pipelined runs: each returns what is wrong with one key, or None."""

import math

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.divisors import nearest_divisors
from mythos_ds.config.layout import expert_stage_size, is_pipelined, rows_per_micro_batch, stage_sizes
from mythos_ds.config.schema import RunConfig
from mythos_ds.errors import Coded, Problem, coded

LITERAL_STAGES = 3
_ZERO = "zero_optimization"
_GATHERING_KEYS = (
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


@coded("MDS201")
def form(config: RunConfig) -> str | None:
    """pp_size by itself, and against the recurrent layers."""
    given, layers = config.parallel.pp_size, config.model.recurrent_layers
    if isinstance(given, list):
        if len(given) == LITERAL_STAGES and min(given) >= 1:
            return None
        return (
            f"{given} given; allowed: three numbers of processes >= 1, [prelude, recurrent, coda], or one number of "
            "equal stages; nearest: [1, 1, 1]"
        )
    if given >= 1 and layers % given == 0:
        return None
    return (
        f"{given} given; allowed: divisors of recurrent_layers = {layers}, whose layers the stages share; nearest: "
        f"{nearest_divisors(given, layers)}"
    )


@coded("MDS203")
def halting(config: RunConfig) -> str | None:
    if not _is_sound(config) or config.model.halting == "none":
        return None
    return (
        f'"{config.model.halting}" given with pp_size {config.parallel.pp_size}; a halted position would have to keep '
        'keys and values on every stage; allowed: "none", or pp_size 1'
    )


@coded("MDS204")
def zero_stage(config: RunConfig) -> str | None:
    stage = config.parallel.zero_stage
    if not _is_sound(config) or stage == 3:
        return None
    return f"{stage} given with pp_size {config.parallel.pp_size}; allowed: 3; nearest: 3"


@coded("MDS205")
def optimizer(config: RunConfig) -> str | None:
    if not _is_sound(config) or config.training.optimizer != "muon":
        return None
    return f'"muon" given with pp_size {config.parallel.pp_size}; allowed: "adamw" or "sgd", or pp_size 1'


@coded("MDS206")
def offload_params(config: RunConfig) -> str | None:
    if not _is_sound(config) or config.parallel.offload_params == "none":
        return None
    return (
        f'"{config.parallel.offload_params}" given with pp_size {config.parallel.pp_size}, where a step holds the '
        'weights of its stage; allowed: "none"'
    )


def gathering_keys(config: RunConfig) -> list[Problem]:
    """Keys of the `deepspeed` section that say when ZeRO-3 gathers weights."""
    zero = config.deepspeed.get(_ZERO, {})
    if not _is_sound(config) or not isinstance(zero, dict):
        return []
    why = "has no effect with a pipeline, which gathers a stage's weights once per step; remove it, or set it to null"
    return [(f"deepspeed.{_ZERO}.{key}", Coded("MDS159", why)) for key in _GATHERING_KEYS if zero.get(key) is not None]


def layout_problem(config: RunConfig, world_size: int) -> Problem | None:
    """Stages against the number of processes."""
    given, layers = config.parallel.pp_size, config.model.recurrent_layers
    if isinstance(given, list):
        if sum(given) == world_size:
            return None
        nearest = _nearest_stages(given, world_size) if world_size >= LITERAL_STAGES else "1 (no pipeline)"
        allowed = f"stages of {world_size} processes in all"
        return "parallel.pp_size", Coded("MDS266", f"{given} given; allowed: {allowed}; nearest: {nearest}")
    if world_size % given == 0:
        return None
    message = (
        f"{given} given; allowed: divisors of the {world_size} processes and of recurrent_layers = {layers}; nearest: "
        f"{nearest_divisors(given, world_size, layers)}"
    )
    return "parallel.pp_size", Coded("MDS266", message)


def expert_problem(config: RunConfig, world_size: int) -> Problem | None:
    """ep_size against the processes of a stage that has experts."""
    ep_size, holders = config.parallel.ep_size, expert_stage_size(config.parallel.pp_size, world_size)
    if ep_size == "auto" or ep_size < 1 or holders % ep_size == 0:
        return None
    which = "a" if isinstance(config.parallel.pp_size, int) else "the recurrent"
    message = (
        f"{ep_size} given; allowed: divisors of the {holders} processes of {which} pipeline stage and of the "
        f"{config.model.n_experts} experts; nearest: {nearest_divisors(ep_size, config.model.n_experts, holders)}, or "
        '"auto"'
    )
    return "parallel.ep_size", Coded("MDS267", message)


def row_problem(config: RunConfig, world_size: int) -> Problem | None:
    """Each process of each stage gets whole rows of a micro-batch."""
    sizes, given = stage_sizes(config.parallel, world_size), config.training.micro_batch_size
    holders = expert_stage_size(config.parallel.pp_size, world_size)
    unit = math.lcm(*(size // math.gcd(size, holders) for size in sizes))
    if given % unit == 0:
        return None
    below, above = given // unit * unit, (given // unit + 1) * unit
    message = (
        f"{given} given; a micro-batch of {given} x {holders} sequences is shared by stages of {list(sizes)} "
        f"processes; allowed: multiples of {unit}; nearest: {f'{below} or {above}' if below else above}"
    )
    return "training.micro_batch_size", Coded("MDS268", message)


def batch_problem(config: RunConfig, world_size: int) -> Problem | None:
    """The micro-batches of a step must keep all stages busy, in the rounds that the schedule knows."""
    unit, batch = rows_per_micro_batch(config, world_size), config.training.global_batch_size
    stages = len(stage_sizes(config.parallel, world_size))
    ring = isinstance(config.parallel.pp_size, int)
    if batch % unit == 0 and _fits(batch // unit, stages, ring):
        return None
    given = batch // unit
    # A multiple of the stages always fits, so that one lies on each side.
    counts = range(max(1, given - stages), given + 2 * stages + 1)
    fitting = [count * unit for count in counts if _fits(count, stages, ring)]
    nearest = [size for size in fitting if size < batch][-1:] + [size for size in fitting if size > batch][:1]
    rounds = f", in whole rounds of {stages} or more" if ring else ""
    message = (
        f"{batch} given; allowed: at least {stages} micro-batches for {stages} pipeline stages{rounds}, of "
        f"{unit} sequences each; nearest: {' or '.join(map(str, nearest))}"
    )
    return "training.global_batch_size", Coded("MDS269", message)


def ramp_problem(config: RunConfig, world_size: int) -> Problem | None:
    """Every size of a batch ramp as `batch_problem` has it."""
    for size in BatchSchedule.of(config.training).sizes():
        training = config.training.model_copy(update={"global_batch_size": size})
        found = batch_problem(config.model_copy(update={"training": training}), world_size)
        if found is not None:
            return "training.global_batch_ramp", Coded("MDS270", f"its batch of {found[1]}")
    return None


def world_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Everything that does not fit `world_size` processes; one cause is named once."""
    if not is_pipelined(config.parallel) or not _is_sound(config):
        return []
    if (layout := layout_problem(config, world_size)) is not None:
        return [layout]
    batch = row_problem(config, world_size) or batch_problem(config, world_size) or ramp_problem(config, world_size)
    experts = expert_problem(config, world_size)
    nodes = None if experts else node_problem(config, world_size)
    return [problem for problem in (experts, nodes, batch) if problem is not None]


def node_problem(config: RunConfig, world_size: int) -> Problem | None:
    """With a cluster named: expert groups cover nodes or parts of one, and the ranks of a ring that speak to each other
    have the same place in their nodes (rails), unless stages share a node."""
    cluster, given = config.cluster, config.parallel.pp_size
    if cluster is None or world_size <= cluster.gpus_per_node:
        return None
    per_node, sizes = cluster.gpus_per_node, stage_sizes(config.parallel, world_size)
    if isinstance(given, int):
        if sizes[0] % per_node == 0 or per_node % sizes[0] == 0:
            return None
        message = (
            f"{given} given; its stages of {sizes[0]} processes would meet across the network cards of nodes of "
            f"{per_node}; allowed: stages of whole nodes, or several in a node"
        )
        return "parallel.pp_size", Coded("MDS271", message)
    ep_size = config.parallel.ep_size
    unit = min(math.gcd(config.model.n_experts, sizes[1]) if ep_size == "auto" else ep_size, per_node)
    if sizes[0] % unit == 0:
        return None
    message = (
        f"{given} given; expert groups of {ep_size} would begin at rank {sizes[0]} and hold parts of nodes of "
        f"{per_node}; allowed: a first stage of a multiple of {unit} processes"
    )
    return "parallel.pp_size", Coded("MDS271", message)


def _nearest_stages(given: list[int], world_size: int) -> list[int]:
    """Three stages of `world_size` (>= 3) processes: the recurrent one gives or takes, then the larger other one."""
    first, last = (min(size, world_size) for size in (given[0], given[2]))
    excess = max(0, first + last - world_size + 1)
    level = min(excess, abs(first - last))  # the larger one gives until both are equal, then they take turns
    turns = excess - level
    if first >= last:
        first -= level
    else:
        last -= level
    first, last = first - (turns + 1) // 2, last - turns // 2
    return [first, world_size - first - last, last]


def _fits(micro_batches: int, stages: int, ring: bool) -> bool:
    """At least one per stage; torch's interleaved schedule wants rounds of equal size."""
    return micro_batches >= stages and (not ring or micro_batches % (micro_batches // stages) == 0)


def _is_sound(config: RunConfig) -> bool:
    """Whether there is a pipeline, of a form that the other rules can look at."""
    return is_pipelined(config.parallel) and form(config) is None
