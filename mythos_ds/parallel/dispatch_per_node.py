"""The dispatcher `per_node`: a token travels once to each node that holds any of its experts, between ranks of equal
place in their nodes, and on inside the node to each rank that does; results are added up at the node on the way back.
"""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.kernels.routing import count_experts
from mythos_ds.model.dispatch import Journey
from mythos_ds.model.routing_replay import RoutingDecision
from mythos_ds.parallel.dispatch_per_rank import RouteOverHops, RowsOverHops
from mythos_ds.parallel.process_groups import NodeGroups
from mythos_ds.parallel.row_exchange import Counts
from mythos_ds.parallel.row_hop import Hop, HopSizes, OwnExperts, Wanted, count_places


class PerNodeDispatcher:
    """Sends a token once to each node of the expert-parallel group, and there once to each rank. Dropless.

    A new decision exchanges counts over nodes and then inside, and the host waits for both at once; one that is given
    again exchanges none.
    """

    returns_sums: ClassVar[bool] = True

    def __init__(self, groups: NodeGroups, *, in_fp8: bool = False):
        self.groups, self._in_fp8 = groups, in_fp8
        self._nodes = torch_distributed.get_world_size(groups.across)
        self._ranks = torch_distributed.get_world_size(groups.inside)

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        """Counts what goes to each node and rank, and asks the ranks of equal place how much comes."""
        counts, ranks = count_experts(indices, n_experts), self._nodes * self._ranks
        local = n_experts // ranks
        nodes = count_places(indices.div(local * self._ranks, rounding_mode="floor"), self._nodes)
        rows = count_places(indices.div(local, rounding_mode="floor"), ranks).view(self._nodes, -1)
        pairs = counts.view(ranks, -1).sum(1).view(self._nodes, -1)
        outgoing = torch.cat([nodes[:, None], rows, pairs], 1)
        return RoutingDecision(indices, counts, Counts.ask(outgoing, self.groups.across))

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        """Lets a row leave for each token and node."""
        if isinstance(decision.route, Counts):
            decision = replace(decision, route=self._agree(decision.route, decision))
        hops = [self.groups.across, self.groups.inside]
        return RowsOverHops(rows, weights, decision, hops, in_fp8=self._in_fp8)

    def _agree(self, counts: Counts, decision: RoutingDecision) -> RouteOverHops:
        # What comes from all nodes for a rank of this one is what this rank will hand on to it.
        across = [_copies_and_pairs(lines) for lines in (counts.outgoing, counts.answer())]
        handed_on = counts.incoming[:, 1:].sum(0).view(2, self._ranks).t().contiguous()
        inside = Counts.ask(handed_on, self.groups.inside)
        both = [*across, handed_on, inside.answer()]
        sizes = torch.cat(both).split([self._nodes] * 2 + [self._ranks] * 2)
        host = torch.cat(both).tolist()
        n = self._nodes
        first = HopSizes(sizes[0], sizes[1], [host[:n], host[n : 2 * n]])
        second = HopSizes(sizes[2], sizes[3], [host[2 * n : -self._ranks], host[-self._ranks :]])
        local = len(decision.counts) // (self._nodes * self._ranks)
        wanted, tokens = Wanted.by_tokens(decision.indices), len(decision.indices)
        there = Hop.plan(wanted, tokens, local * self._ranks, first, self.groups.across)
        onward = Hop.plan(there.wanted, there.arriving, local, second, self.groups.inside)
        return RouteOverHops((there, onward), OwnExperts.of(onward, local))


def _copies_and_pairs(lines: Tensor) -> Tensor:
    """int64 [nodes, 2] of lines [nodes, 1 + 2 ranks]: copies for the node, and pairs of all its ranks."""
    ranks = lines.shape[1] // 2
    return torch.stack([lines[:, 0], lines[:, 1 + ranks :].sum(1)], 1)
