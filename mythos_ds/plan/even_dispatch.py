"""The dispatchers of a run on the meta device, where nothing travels and as many rows come as go: what they hold and
compute on one process, with tokens spread evenly over the experts.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.reach import places_reached
from mythos_ds.kernels.permute import inverse_permutation
from mythos_ds.kernels.routing import count_experts
from mythos_ds.kernels.row_segments import Segments
from mythos_ds.model.dispatch import Dispatcher, Journey, LocalDispatcher
from mythos_ds.model.routing_replay import RoutingDecision
from mythos_ds.parallel.dispatch_all_to_all import RowsToExperts, SortedRoute
from mythos_ds.parallel.dispatch_per_rank import RouteOverHops, RowsOverHops
from mythos_ds.parallel.row_exchange import Nobody
from mythos_ds.parallel.row_hop import Hop, OwnExperts, Wanted


def even_dispatcher(
    name: str, model: ModelConfig, ep_size: int, ranks_per_node: int, *, in_fp8: bool = False
) -> Dispatcher:
    """Makes the stand-in of a dispatcher for expert groups of `ep_size`."""
    if ep_size == 1:
        return LocalDispatcher()
    if name == "all_to_all":
        return _ToExperts(in_fp8)
    nodes = ep_size // ranks_per_node
    places = (nodes, ep_size) if name == "per_node" else (ep_size,)
    return _OverHops(tuple(places_reached(model, number) for number in places), model.n_experts // ep_size, in_fp8)


@dataclass(frozen=True)
class _ToExperts:
    in_fp8: bool
    returns_sums: ClassVar[bool] = False

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        return LocalDispatcher().decide(indices, n_experts)

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        route = decision.route
        if not isinstance(route, SortedRoute):
            order, number = _integers(weights.numel()), [weights.numel()]
            route = SortedRoute(route, number, number, order, inverse_permutation(order), decision.counts)
        decision = replace(decision, route=route)
        rows = route.rows.sort(rows, weights.shape[1])
        return RowsToExperts(rows, weights, decision, Nobody(), in_fp8=self.in_fp8)


@dataclass(frozen=True)
class _OverHops:
    copies: tuple[float, ...]
    """Of a token after each hop."""
    local: int
    """Experts of this process."""
    in_fp8: bool
    returns_sums: ClassVar[bool] = True

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        return RoutingDecision(indices, count_experts(indices, n_experts))

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        if decision.route is None:
            decision = replace(decision, route=self._route(len(rows), weights.numel()))
        hops = [Nobody(hop) for hop in range(len(self.copies))]
        return RowsOverHops(rows, weights, decision, hops, in_fp8=self.in_fp8)

    def _route(self, tokens: int, pairs: int) -> RouteOverHops:
        hops, here = [], tokens
        for copies in self.copies:
            there = min(pairs, round(tokens * copies))
            order, back = _integers(pairs), _integers(pairs)
            wanted = Wanted(_integers(pairs), _integers(pairs))
            hops.append(Hop(_segments(there, here), order, back, ([there], [there]), ([pairs], [pairs]), wanted))
            here = there
        return RouteOverHops(tuple(hops), OwnExperts(_segments(pairs, here), _integers(pairs), _integers(self.local)))


def _segments(copies: int, rows: int) -> Segments:
    return Segments(_integers(copies), _integers(copies), _integers(rows + 1))


def _integers(number: int) -> Tensor:
    return torch.empty(number, dtype=torch.int64, device="meta")
