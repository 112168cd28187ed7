"""How rows reach their experts and come back: what every dispatcher offers, and the one of a single process.

A call goes in phases, between which other work may run: `send` lets the rows leave, `compute` runs the experts on what
arrived, `send_back` lets the results leave, `receive` adds them up. Where rows change from one kind of link to another
on their way, `hand_on` and `hand_back` do so; of several calls the links of both kinds are then busy at once.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from mythos_ds.kernels.permute import repeat_permute_rows, weighted_sum_of_rows
from mythos_ds.kernels.routing import sort_by_expert
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.routing_replay import RoutingDecision


class Journey(Protocol):
    """The rows of one call of a mixture, under way."""

    decision: RoutingDecision
    """With all that was found out about where rows go: a call that is given it asks nobody again."""

    def hand_on(self) -> None:
        """Lets rows that came go on, where this process is only a stop on their way."""
        ...

    def compute(self, experts: Experts) -> None:
        """Computes this process's experts on the rows that came."""
        ...

    def send_back(self) -> None:
        """Lets the results leave."""
        ...

    def hand_back(self) -> None:
        """Does with results what `hand_on` does with rows."""
        ...

    def receive(self, shared: Tensor | None, stream: Tensor | None) -> Tensor:
        """Adds up each token's weighted results: [n, dim], plus `shared` [n, dim] in the rows' dtype, and that to the
        residual `stream` [n, dim] in the stream's dtype, where given."""
        ...


class Dispatcher(Protocol):
    """Brings rows to their experts and back.

    Attributes:
        returns_sums: whether results come back as weighted sums, so that no gradient needs them a second time.
    """

    returns_sums: ClassVar[bool]

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        """Finds what follows from the chosen experts, int64 [n, k], before any row travels."""
        ...

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        """Lets rows [n, dim] leave for their experts; weights fp32 [n, k] are those of each token's experts."""
        ...


@dataclass(frozen=True)
class SortedRows:
    """Where the rows of tokens, one for each chosen expert, lie once they are sorted by expert."""

    order: Tensor
    """int64 [n * k]: the rows by expert."""
    back: Tensor
    """int64 [n * k]: the inverse of `order`."""

    def sort(self, rows: Tensor, k: int) -> Tensor:
        """Repeats rows [n, dim] k times and sorts them: [n * k, dim]."""
        return repeat_permute_rows(rows, self.order, self.back, k)

    def add_up(self, rows: Tensor, weights: Tensor, shared: Tensor | None, stream: Tensor | None) -> Tensor:
        """Adds up sorted rows [n * k, dim] by token, times their weights [n, k], as `Journey.receive` does."""
        return weighted_sum_of_rows(rows, weights, self.back, self.order, shared, stream)


class _Stay:
    """Rows that go nowhere."""

    def __init__(self, rows: Tensor, weights: Tensor, decision: RoutingDecision):
        self.decision, self._weights = decision, weights
        self._sorted: SortedRows = decision.route
        self._rows = self._sorted.sort(rows, weights.shape[1])

    def hand_on(self) -> None:
        """Does nothing."""

    def compute(self, experts: Experts) -> None:
        """Computes all experts."""
        self._rows = experts(self._rows, self.decision.counts)

    def send_back(self) -> None:
        """Does nothing."""

    def hand_back(self) -> None:
        """Does nothing."""

    def receive(self, shared: Tensor | None, stream: Tensor | None) -> Tensor:
        """Adds up each token's rows."""
        return self._sorted.add_up(self._rows, self._weights, shared, stream)


class LocalDispatcher:
    """The dispatcher of a process that holds all experts."""

    returns_sums: ClassVar[bool] = False

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        """Sorts the rows by expert."""
        order, back, counts = sort_by_expert(indices, n_experts=n_experts)
        return RoutingDecision(indices, counts, SortedRows(order, back))

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        """Puts the rows in that order."""
        return _Stay(rows, weights, decision)
