"""Bytes that a process hands to each collective in an optimizer step, by formula; mythos-ds calibrate counts them."""

from dataclasses import dataclass
from math import prod

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.flops import training_depth_pmf
from mythos_ds.costs.pipeline import sent_bytes, visits_of
from mythos_ds.costs.reach import places_reached, planned_dispatch
from mythos_ds.model.parameter_roles import is_expert
from mythos_ds.plan.exchange import exchanged, hop_links
from mythos_ds.plan.memory import parameter_shapes, reduced_bytes

_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Traffic:
    """Bytes per process and optimizer step, as the collectives count them.

    Attributes:
        gather: results of all-gathers of weights that all processes of a stage share.
        gather_experts: results of all-gathers of expert weights, over the processes that hold the same experts.
        reduce: gradients handed to reduce-scatter, of shared weights.
        reduce_experts: the same, of expert weights.
        exchange: rows handed to all-to-all, there and back, with even routing; with their weights, where these travel.
        counts: the integers that go before the rows.
        ring: messages sent to the next stage, and gradients back.
    """

    gather: float
    gather_experts: float
    reduce: float
    reduce_experts: float
    exchange: float
    counts: float
    ring: float


LIMITED_NODES = 4
"""Nodes that a token's experts are limited to, where a configuration sets no limit (DeepSeek-V3, arXiv 2412.19437)."""


@dataclass(frozen=True)
class NodeLimit:
    """What leaves a node of a run whose expert groups span `nodes` nodes, and what it would be otherwise: copies of a
    token that go to other nodes in each looped layer, with even routing.

    Attributes:
        dispatch: the run's dispatcher.
        sent: as the run is.
        one_per_expert: by "all_to_all", limited or not.
        once_per_node: by "per_node", without a limit.
        limit: nodes that a token's experts would lie on.
        limited: by "per_node" with that limit.
    """

    nodes: int
    dispatch: str
    sent: float
    one_per_expert: float
    once_per_node: float
    limit: int
    limited: float


def node_limit(resolved: ResolvedRun, gpus_per_node: int) -> NodeLimit | None:
    """None where expert groups fit a node."""
    nodes, model = resolved.ep_size // gpus_per_node, resolved.config.model
    if nodes < 2:
        return None
    free = model.model_copy(update={"n_expert_groups": None, "n_limited_groups": None})
    used, elsewhere = model.n_experts_per_tok, 1 - 1 / nodes
    limited = model.n_limited_groups if model.n_expert_groups == nodes else None
    limit = min(LIMITED_NODES if limited is None else limited, nodes, used)
    reached = places_reached(free, nodes)
    stage = next(index for index, each in enumerate(resolved.stages) if each.part.recurrent)
    sent = sum(hop.copies * hop.far / (hop.near + hop.far) for hop in hop_links(resolved, stage, gpus_per_node))
    return NodeLimit(
        nodes,
        planned_dispatch(resolved, gpus_per_node).name,
        sent,
        used * elsewhere,
        reached * elsewhere,
        limit,
        min(limit, reached) * elsewhere,
    )


def mean_graded_loops(resolved: ResolvedRun) -> float:
    """Expected loops with gradient of a step: of min(L, the depth of the gradient)."""
    pmf = training_depth_pmf(resolved.config, resolved.grows_from)
    return sum(p * min(loops, resolved.mean_backprop_depth) for loops, p in enumerate(pmf, 1))


def traffic(
    resolved: ResolvedRun, n_loops: float, index: int = 0, *, persistent: bool = True, graded: float | None = None
) -> Traffic:
    """The traffic of a process of stage `index` in a step of n_loops loops, `graded` of them with gradient (None: as
    many as may be). Mean counts of both give the mean.

    persistent: small weights stay gathered between micro-batches, as `stage3_param_persistence_threshold` says.
    """
    pipelined = len(resolved.stages) > 1
    config, stage = resolved.config, resolved.stages[index]
    ep_size = resolved.layout(stage.first_rank).ep_size
    micro_batches = resolved.gradient_accumulation_steps
    size, wire = _BYTES[config.training.dtype], reduced_bytes(resolved)
    zero = resolved.deepspeed.get("zero_optimization", {})
    kept = int(zero.get("stage3_param_persistence_threshold", 100_000)) if persistent else 0
    shared = experts = small = reduced = reduced_experts = 0
    for name, shape in parameter_shapes(config.model, stage.part):
        cut = ep_size if is_expert(name) else 1
        ranks = stage.size // cut
        numel = prod(shape) // cut
        padded = -(-numel // ranks) * ranks
        if cut > 1:
            experts += padded if ranks > 1 else 0
            reduced_experts += padded
        else:
            reduced += padded
            if ranks > 1 and numel <= kept:
                small += padded
            elif ranks > 1:
                shared += padded
    if pipelined:
        gather, gather_experts = size * (shared + small), size * experts
        reduce, reduce_experts = wire * reduced, wire * reduced_experts
        ring = float(sent_bytes(visits_of(resolved, round(n_loops)), micro_batches)[index])
    else:
        gather, gather_experts = size * (2 * micro_batches * shared + small), 2 * size * micro_batches * experts
        reduce, reduce_experts = wire * micro_batches * reduced, wire * micro_batches * reduced_experts
        ring = 0.0
    graded = min(resolved.mean_backprop_depth, n_loops) if graded is None else graded
    rows = exchanged(resolved, n_loops, graded, index)
    return Traffic(gather, gather_experts, reduce, reduce_experts, rows.total, rows.integers, ring)
