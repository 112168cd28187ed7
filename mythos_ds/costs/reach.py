"""Where a token's experts lie, with even routing, and what brings it there. Pure; no torch."""

from dataclasses import dataclass
from math import comb

from mythos_ds.config.dispatch import choose_dispatch
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import ModelConfig

GPUS_PER_NODE = 8
"""Where the configuration names no cluster."""


@dataclass(frozen=True)
class PlannedDispatch:
    """The dispatcher of a run, of how many ranks each node of an expert group has, and whether rows travel in fp8."""

    name: str
    ranks_per_node: int
    in_fp8: bool


def planned_dispatch(resolved: ResolvedRun, ranks_per_node: int | None = None) -> PlannedDispatch:
    """Chooses as the run will on GPUs; for "deepep" the one that sends the same rows. ranks_per_node: None for what the
    configuration's cluster says."""
    cluster = resolved.config.cluster
    per_node = ranks_per_node or (GPUS_PER_NODE if cluster is None else cluster.gpus_per_node)
    parallel, ep_size = resolved.config.parallel, resolved.ep_size
    name = choose_dispatch(parallel.dispatch, ep_size, per_node, "cuda").name
    if name == "deepep":
        name = "per_node" if 1 < per_node < ep_size and ep_size % per_node == 0 else "per_rank"
    return PlannedDispatch(name, min(per_node, ep_size), parallel.dispatch_dtype == "fp8")


def places_reached(model: ModelConfig, places: int) -> float:
    """Computes the mean number of places that hold any of a token's experts, where each of `places` holds as many.

    Every choice is as likely as any other. With group-limited routing, of which a group is chosen for its two best
    experts, these are the candidates: of few groups a token uses both of each, of more groups any.
    """
    experts, chosen = model.n_experts, model.n_experts_per_tok
    groups, limit = model.n_expert_groups, model.n_limited_groups
    if groups is None or limit is None or (groups % places and places % groups):
        return _reached(experts, places, chosen)
    used = _reached(2 * limit, limit, chosen) if 2 * limit > chosen else float(limit)
    if groups % places == 0:
        return _reached(groups, places, used)
    return used * _reached(experts // groups, places // groups, chosen / used)


def _reached(items: int, places: int, chosen: float) -> float:
    """Of `items` items, as many at each of `places` places, `chosen` are drawn: the mean number of places hit; along
    the line between whole numbers of drawn items."""
    low = int(chosen)
    drawn = low, min(low + 1, items)
    few, more = (places * (1 - comb(items - items // places, each) / comb(items, each)) for each in drawn)
    return few + (chosen - low) * (more - few)
