"""Bytes that rows of tokens take to their experts and back, by dispatcher, with even routing.

All numbers are of one process and add up what it hands to all-to-all, its own share included, which goes nowhere.
"""

from dataclasses import dataclass

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import RunConfig
from mythos_ds.costs.reach import PlannedDispatch, places_reached, planned_dispatch
from mythos_ds.hardware import Gpu
from mythos_ds.kernels.row_quantisation import SCALE_BYTES
from mythos_ds.parallel.overlap import CHUNKS, LANES

_BYTES = {"bfloat16": 2, "float32": 4}
_INTEGER_BYTES, _WEIGHT_BYTES = 8, 4


@dataclass(frozen=True)
class Exchanged:
    """Bytes of a process.

    Attributes:
        total: handed to all-to-all: rows, routing weights, and the gradients of both.
        node: of these, to other ranks of its node.
        network: to other nodes.
        integers: handed to all-to-all before the rows: counts, and which copy and expert is meant.
    """

    total: float = 0.0
    node: float = 0.0
    network: float = 0.0
    integers: float = 0.0

    def __mul__(self, times: float) -> "Exchanged":
        return Exchanged(self.total * times, self.node * times, self.network * times, self.integers * times)


@dataclass(frozen=True)
class HopLinks:
    """An all-to-all: ranks that share a node with the sender, it included, those on other nodes, and copies of a
    token."""

    near: int
    far: int
    copies: float

    def split(self, size: float) -> tuple[float, float]:
        """Takes of `size` bytes, handed to it evenly, those to other ranks of the node, and those to other nodes."""
        ranks = self.near + self.far
        return size * max(0, self.near - 1) / ranks, size * self.far / ranks

    def seconds(self, size: float, gpu: Gpu) -> float:
        """Computes how long `size` bytes take over both kinds of links, which work at the same time."""
        node, network = self.split(size)
        return max(node / gpu.node_bandwidth, network / gpu.network_bandwidth)


def exchanged(
    resolved: ResolvedRun, n_loops: float, graded: float, index: int = 0, ranks_per_node: int | None = None
) -> Exchanged:
    """Computes the exchange of a process of stage `index` in a step of n_loops loops, `graded` of them with gradient.

    Rows go to their experts and back in every forward, and their gradients in every backward; what is recomputed
    repeats the way out, and the way back where something behind it is needed, but no integers. Gradients never go in
    eight bits.
    """
    config, stage = resolved.config, resolved.stages[index]
    ep_size = resolved.layout(stage.first_rank).ep_size
    if ep_size == 1:
        return Exchanged()
    dispatch, model = planned_dispatch(resolved, ranks_per_node), config.model
    tokens, layers = stage.rows * config.training.seq_len, len(stage.part.recurrent)
    pairs, row = tokens * model.n_experts_per_tok, model.dim * _BYTES[config.training.dtype]
    recomputed = graded if config.parallel.activation_checkpointing != "none" else 0.0
    sent = model.dim + SCALE_BYTES if dispatch.in_fp8 else row
    rows_out = (n_loops + recomputed) * sent + graded * row
    out = n_loops + graded + recomputed
    back = n_loops + graded + recomputed * repeated_way_back(config, dispatch, layers)
    weights = 0.0 if dispatch.name == "all_to_all" else pairs * _WEIGHT_BYTES
    total = node = network = 0.0
    for hop in hop_links(resolved, index, ranks_per_node):
        size = tokens * hop.copies * (rows_out + row * back) + weights * out
        near, far = hop.split(size)
        total, node, network = total + size, node + near, network + far
    calls = 1
    if config.parallel.overlap:
        calls = LANES * (CHUNKS if tokens // LANES % CHUNKS == 0 else 1)
    integers = n_loops * (calls * _counts(dispatch, ep_size, model.n_experts) + _told(dispatch, pairs))
    return Exchanged(total, node, network, integers) * (layers * resolved.gradient_accumulation_steps)


def repeated_way_back(config: RunConfig, dispatch: PlannedDispatch, layers: int) -> float:
    """Computes the share of recomputed layers whose way back is repeated.

    Where weights are applied at the expert's rank, a recompute that ends with the layer has all it needs before.
    """
    model = config.model
    if dispatch.name == "all_to_all" or model.norm_placement == "after":
        return 1.0
    if config.parallel.activation_checkpointing == "layer":
        return 0.0
    ends_later = model.halting in ("act", "act_openmythos") or (model.lora_rank and model.lora_target == "output")
    return 1.0 if ends_later else (layers - 1) / layers


def hop_links(resolved: ResolvedRun, index: int, ranks_per_node: int | None = None) -> list[HopLinks]:
    """Lists the hops of a journey of stage `index`, which has experts on several ranks."""
    dispatch = planned_dispatch(resolved, ranks_per_node)
    ep_size = resolved.layout(resolved.stages[index].first_rank).ep_size
    model, per_node = resolved.config.model, dispatch.ranks_per_node
    near = min(per_node, ep_size)
    if dispatch.name == "per_node":
        nodes = ep_size // per_node
        across = HopLinks(1, nodes - 1, places_reached(model, nodes))
        return [across, HopLinks(per_node, 0, places_reached(model, ep_size))]
    copies = model.n_experts_per_tok if dispatch.name == "all_to_all" else places_reached(model, ep_size)
    return [HopLinks(near, ep_size - near, copies)]


def _counts(dispatch: PlannedDispatch, ep_size: int, n_experts: int) -> int:
    """Bytes of the counts that a call of a mixture exchanges."""
    if dispatch.name == "all_to_all":
        return n_experts * _INTEGER_BYTES
    if dispatch.name == "per_rank":
        return 2 * ep_size * _INTEGER_BYTES
    ranks = dispatch.ranks_per_node
    return (ep_size // ranks * (1 + 2 * ranks) + 2 * ranks) * _INTEGER_BYTES


def _told(dispatch: PlannedDispatch, pairs: int) -> int:
    """Bytes that say which copy and expert is meant, of each pair and on each hop."""
    return {"all_to_all": 0, "per_rank": 1, "per_node": 2}[dispatch.name] * pairs * _INTEGER_BYTES
