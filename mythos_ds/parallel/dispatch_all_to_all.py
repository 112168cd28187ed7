"""The dispatcher `all_to_all`: a row for each token and expert, to the expert's rank and back."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.kernels.permute import inverse_permutation, permute_rows
from mythos_ds.model.dispatch import Journey, LocalDispatcher, SortedRows
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.routing_replay import RoutingDecision
from mythos_ds.parallel.row_exchange import Counts, Group, Passage


@dataclass(frozen=True)
class _Asked:
    """Rows sorted by global expert, before it is known what the other ranks send."""

    rows: SortedRows
    counts: Counts
    """[ranks, local experts]"""


@dataclass(frozen=True)
class SortedRoute:
    """Where the rows of one call go, agreed with the other ranks of the group."""

    rows: SortedRows
    """As they leave, and come back."""
    send: list[int]
    receive: list[int]
    """Rows to and from each rank."""
    order: Tensor
    back: Tensor
    """int64 [arriving rows]: the order by own expert, and its inverse."""
    counts: Tensor
    """int64 [local experts]: arriving rows of each."""


class AllToAllDispatcher:
    """Brings rows to the ranks of their experts and back. Dropless: every row arrives, however uneven the load.

    A new decision exchanges counts and waits for them on the host, as row exchanges take their sizes from there; one
    that is given again does neither.
    """

    returns_sums: ClassVar[bool] = False

    def __init__(self, group: torch_distributed.ProcessGroup, *, in_fp8: bool = False):
        self.group, self._in_fp8 = group, in_fp8
        self._size = torch_distributed.get_world_size(group)

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        """Sorts the rows by global expert, and asks the others how many come."""
        decision = LocalDispatcher().decide(indices, n_experts)
        counts = Counts.ask(decision.counts.view(self._size, -1), self.group)
        return replace(decision, route=_Asked(decision.route, counts))

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        """Lets a row leave for each token and expert."""
        rows = decision.route.rows.sort(rows, weights.shape[1])
        if isinstance(decision.route, _Asked):
            decision = replace(decision, route=_agree(decision.route))
        return RowsToExperts(rows, weights, decision, self.group, in_fp8=self._in_fp8)


class RowsToExperts:
    """A row for each token and expert, under way."""

    def __init__(
        self,
        rows: Tensor,
        weights: Tensor,
        decision: RoutingDecision,
        group: Group,
        *,
        in_fp8: bool = False,
    ):
        """Lets sorted rows [n * k, dim] leave."""
        self.decision, self._weights = decision, weights
        self._route: SortedRoute = decision.route
        self._there = Passage(self._route.send, self._route.receive, group, in_fp8)
        self._back = Passage(self._route.receive, self._route.send, group)
        self._rows = self._there.leave(rows)

    def hand_on(self) -> None:
        """Does nothing: rows go straight to their experts."""

    def compute(self, experts: Experts) -> None:
        """Computes this rank's experts."""
        route = self._route
        arrived = permute_rows(self._there.arrive(self._rows), route.order, route.back)
        self._rows = permute_rows(experts(arrived, route.counts), route.back, route.order)

    def send_back(self) -> None:
        """Lets a row leave for each that came."""
        self._rows = self._back.leave(self._rows)

    def hand_back(self) -> None:
        """Does nothing: results come straight back."""

    def receive(self, shared: Tensor | None, stream: Tensor | None) -> Tensor:
        """Adds up each token's rows."""
        return self._route.rows.add_up(self._back.arrive(self._rows), self._weights, shared, stream)


def _agree(asked: _Asked) -> SortedRoute:
    outgoing, incoming = asked.counts.outgoing, asked.counts.answer()
    send, receive = torch.stack([outgoing.sum(1), incoming.sum(1)]).tolist()
    order, back = _by_own_expert(incoming, sum(receive))
    return SortedRoute(asked.rows, send, receive, order, back, incoming.sum(0))


def _by_own_expert(incoming: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Row order by (expert, source rank) for rows that arrive by (source rank, expert), and its inverse.

    incoming: int64 [ranks, local experts], rows per source rank and expert.
    """
    expert_of_run = torch.arange(incoming.shape[1], device=incoming.device).repeat(incoming.shape[0])
    order = expert_of_run.repeat_interleave(incoming.flatten(), output_size=rows).argsort(stable=True)
    return order, inverse_permutation(order)
