"""Which dispatcher carries rows to experts. Pure; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from mythos_ds.config.schema import RunConfig
from mythos_ds.errors import Coded, coded

HAS_RUN_ON = {"all_to_all": ("cpu", "cuda"), "per_rank": ("cpu",), "per_node": ("cpu",), "deepep": ()}
"""Kinds of devices on which training with a dispatcher was compared with one process."""
LOCAL = "local"
"""Where each process holds all experts, and no row travels."""


@dataclass(frozen=True)
class DispatchChoice:
    """A dispatcher by its name in `HAS_RUN_ON`, or `LOCAL`; `why` is empty where the configuration names it."""

    name: str
    why: str = ""


def choose_dispatch(setting: str, ep_size: int, ranks_per_node: int, device: str) -> DispatchChoice:
    """Chooses for expert groups of `ep_size` consecutive ranks, on "cpu" or "cuda"."""
    if ep_size == 1:
        return DispatchChoice(LOCAL, "every process holds all experts" if setting == "auto" else "")
    if setting != "auto":
        return DispatchChoice(setting)
    whole = ranks_per_node > 1 and ep_size % ranks_per_node == 0
    spans = ep_size > ranks_per_node
    best = "per_node" if spans and whole else "per_rank"
    where = "more than one node" if spans else "one node"
    if device not in HAS_RUN_ON[best]:
        return DispatchChoice("all_to_all", f'an expert group is on {where}, but "{best}" has never run on {device}')
    ranks = "" if whole or not spans else ", but not on whole nodes of several processes"
    return DispatchChoice(best, f"an expert group is on {where}{ranks}")


@coded("MDS281")
def dispatch_problem(config: RunConfig, ep_size: int, ranks_per_node: int | None) -> str | None:
    """Says why the dispatcher that a configuration names has no effect, or cannot run. ranks_per_node: None if not
    known."""
    setting = config.parallel.dispatch
    if setting in ("all_to_all", "auto"):
        return None
    if ep_size == 1:
        return f'"{setting}" given with ep_size 1, where every process holds all experts; nearest: "auto"'
    if setting == "deepep" and config.training.dtype != "bfloat16":
        return f'"deepep" given with training.dtype {config.training.dtype}; allowed: bfloat16; nearest: "per_rank"'
    if setting in ("per_rank", "deepep") or ranks_per_node is None:
        return None
    if ranks_per_node == 1:
        return '"per_node" given with one process on each node, where it is the same as "per_rank"; nearest: "per_rank"'
    if ep_size <= ranks_per_node:
        return (
            f'"per_node" given, but expert groups of {ep_size} lie within one node of {ranks_per_node} processes; '
            'nearest: "per_rank"'
        )
    if ep_size % ranks_per_node:
        return (
            f'"per_node" given, but expert groups of {ep_size} are no whole nodes of {ranks_per_node} processes; '
            'nearest: "per_rank"'
        )
    return None


@coded("MDS283")
def dispatch_dtype_problem(config: RunConfig, ep_size: int) -> str | None:
    """Says why rows in eight bits would have no effect."""
    if config.parallel.dispatch_dtype == "training":
        return None
    if config.parallel.dispatch == "deepep":
        return '"fp8" given with dispatch "deepep", whose transport takes bfloat16; nearest: "training"'
    if ep_size > 1:
        return None
    return '"fp8" given with ep_size 1, where every process holds all experts; nearest: "training"'


@coded("MDS282")
def overlap_problem(config: RunConfig, ep_size: int, rows: Sequence[int]) -> str | None:
    """Says why a configuration cannot run in two lanes, or would gain nothing. rows: sequences of a micro-batch that a
    process of each pipeline stage computes."""
    if not config.parallel.overlap:
        return None
    if ep_size == 1:
        return "true given with ep_size 1, where every process holds all experts; nearest: false"
    if config.model.halting in ("act", "act_openmythos"):
        return f'true given with halting "{config.model.halting}"; allowed: "none" or "gate"; nearest: false'
    if config.parallel.dispatch == "deepep":
        return 'true given with dispatch "deepep", whose transport waits where it sends; nearest: false'
    if odd := [number for number in rows if number % 2]:
        return (
            f"true given with micro-batches of {odd[0]} sequences on a process; allowed: an even number; nearest: false"
        )
    return None


def known_dispatch_problem(config: RunConfig) -> Coded | None:
    """`dispatch_problem` of what the file itself says."""
    ep_size, cluster = config.parallel.ep_size, config.cluster
    if ep_size == "auto":
        return None
    return dispatch_problem(config, ep_size, cluster.gpus_per_node if cluster is not None else None)


def known_dispatch_dtype_problem(config: RunConfig) -> Coded | None:
    """`dispatch_dtype_problem` of what the file itself says."""
    ep_size = config.parallel.ep_size
    return None if ep_size == "auto" else dispatch_dtype_problem(config, ep_size)
