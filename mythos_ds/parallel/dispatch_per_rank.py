"""The dispatcher `per_rank`: a token travels once to each rank that holds any of its experts; one row comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.kernels.permute import permute_rows
from mythos_ds.kernels.routing import count_experts
from mythos_ds.kernels.row_segments import repeat_rows, weighted_sum_rows
from mythos_ds.model.dispatch import Journey
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.routing_replay import RoutingDecision
from mythos_ds.parallel.row_exchange import Counts, Group
from mythos_ds.parallel.row_hop import Hop, HopSizes, OwnExperts, RowsOnHop, Wanted, count_places


@dataclass(frozen=True)
class RouteOverHops:
    """The hops of one call, agreed with the other ranks, and the experts behind the last."""

    hops: tuple[Hop, ...]
    own: OwnExperts


class RowsOverHops:
    """Rows that go over one hop after the other to their experts, and are added up on the way back after each."""

    def __init__(
        self, rows: Tensor, weights: Tensor, decision: RoutingDecision, groups: Sequence[Group], *, in_fp8: bool = False
    ):
        self.decision = decision
        self._route: RouteOverHops = decision.route
        self._groups, self._in_fp8 = groups, in_fp8
        self._under_way = [RowsOnHop(self._route.hops[0], rows, weights.flatten(), groups[0], in_fp8=in_fp8)]

    def hand_on(self) -> None:
        """Lets rows leave on the second hop, if there is one."""
        for hop, group in zip(self._route.hops[1:], self._groups[1:], strict=True):
            self._under_way.append(RowsOnHop(hop, *self._under_way[-1].arrive(), group, in_fp8=self._in_fp8))

    def compute(self, experts: Experts) -> None:
        """Computes this rank's experts on each row that came, and adds up one row for it."""
        rows, weights = self._under_way[-1].arrive()
        own = self._route.own
        results = experts(repeat_rows(rows, own.slots), own.counts)
        weights = permute_rows(weights, own.order, own.slots.by_row)
        self._sums = weighted_sum_rows(results, weights, own.slots)

    def send_back(self) -> None:
        """Lets these rows leave."""
        self._under_way[-1].send_back(self._sums)

    def hand_back(self) -> None:
        """Lets what came back over the second hop, if there is one, leave on the first."""
        while len(self._under_way) > 1:
            rows = self._under_way.pop().add_up()
            self._under_way[-1].send_back(rows)

    def receive(self, shared: Tensor | None, stream: Tensor | None) -> Tensor:
        """Adds up each token's rows."""
        return self._under_way[0].add_up(shared, stream)


class PerRankDispatcher:
    """Sends a token once to each rank of the expert-parallel group. Dropless.

    A new decision exchanges two counts per rank, for which the host waits, and for each pair of a token and an expert
    which is meant; one that is given again does neither.
    """

    returns_sums: ClassVar[bool] = True

    def __init__(self, group: torch_distributed.ProcessGroup, *, in_fp8: bool = False):
        self.group, self._in_fp8 = group, in_fp8
        self._size = torch_distributed.get_world_size(group)

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        """Counts what goes to each rank, and asks the others how much comes."""
        counts, local = count_experts(indices, n_experts), n_experts // self._size
        places = count_places(indices.div(local, rounding_mode="floor"), self._size)
        outgoing = torch.stack([places, counts.view(self._size, -1).sum(1)], 1)
        return RoutingDecision(indices, counts, Counts.ask(outgoing, self.group))

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        """Lets a row leave for each token and rank."""
        if isinstance(decision.route, Counts):
            decision = replace(decision, route=self._agree(decision.route, decision))
        return RowsOverHops(rows, weights, decision, [self.group], in_fp8=self._in_fp8)

    def _agree(self, counts: Counts, decision: RoutingDecision) -> RouteOverHops:
        outgoing, incoming = counts.outgoing, counts.answer()
        sizes = HopSizes(outgoing, incoming, torch.stack([outgoing, incoming]).tolist())
        local = len(decision.counts) // self._size
        hop = Hop.plan(Wanted.by_tokens(decision.indices), len(decision.indices), local, sizes, self.group)
        return RouteOverHops((hop,), OwnExperts.of(hop, local))
