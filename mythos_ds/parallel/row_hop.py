"""One hop of rows over a group of ranks: each row goes once to every rank where something is wanted of it, with what is
wanted and the routing weights; and one row comes back from there.

What is wanted are pairs of a row and an expert. A hop sorts them by destination, sends a copy of a row for each
destination, and tells it for each pair which of the copies, and which of its experts, is meant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mythos_ds.kernels.permute import inverse_permutation, permute_rows
from mythos_ds.kernels.row_segments import Segments, bounds_of, repeat_rows, sum_rows
from mythos_ds.parallel.row_exchange import Group, Passage


@dataclass(frozen=True)
class Wanted:
    """Pairs of a row and an expert, those of the first row first."""

    row_of: Tensor
    """int64 [pairs]: the row, never falling."""
    experts: Tensor
    """int64 [pairs]: the expert, counted from the first that the hop's group, or this rank, holds."""

    @classmethod
    def by_tokens(cls, indices: Tensor) -> "Wanted":
        """Makes those of tokens with experts int64 [tokens, k]."""
        row_of = torch.arange(indices.numel(), device=indices.device).div(indices.shape[1], rounding_mode="floor")
        return cls(row_of, indices.flatten())


@dataclass(frozen=True)
class HopSizes:
    """Copies and pairs to and from each rank of a hop's group; the same numbers on the device and on the host."""

    outgoing: Tensor
    incoming: Tensor
    """int64 [ranks, 2]: copies, pairs."""
    host: list[list[list[int]]]
    """Both, as `torch.stack([outgoing, incoming]).tolist()` says."""

    def lists(self, what: int) -> tuple[list[int], list[int]]:
        """Takes copies (0) or pairs (1): those sent and those received, by rank."""
        sent, received = self.host
        return [line[what] for line in sent], [line[what] for line in received]


def count_places(destinations: Tensor, size: int) -> Tensor:
    """Counts how many rows want anything of each of `size` places: destinations int64 [rows, k] -> int64 [size]."""
    places = destinations.sort(-1).values
    new = torch.ones_like(places)
    new[:, 1:] = places[:, 1:] != places[:, :-1]
    return places.new_zeros(size).scatter_add_(0, places.flatten(), new.flatten())


@dataclass(frozen=True)
class Hop:
    """Where the rows of one call go, and what is wanted where they arrive. Integers; kept for a recompute."""

    copies: Segments
    """The copies that leave, by destination, of the rows here."""
    order: Tensor
    back: Tensor
    """int64 [pairs]: the pairs by destination, and the inverse."""
    rows: tuple[list[int], list[int]]
    pairs: tuple[list[int], list[int]]
    """Copies and pairs to and from each rank."""
    wanted: Wanted
    """What is wanted of the rows that arrive, counted from the first expert of this rank."""

    @classmethod
    def plan(cls, wanted: Wanted, rows: int, experts: int, sizes: HopSizes, group: Group) -> "Hop":
        """Plans the hop of `rows` rows to ranks that hold, or lead to, `experts` experts each. Collective."""
        destination = wanted.experts.div(experts, rounding_mode="floor")
        order = destination.to(torch.int16).argsort(stable=True)  # two bytes: as in kernels/routing.py
        row, place = wanted.row_of[order], destination[order]
        new = torch.ones_like(row)
        new[1:] = (row[1:] != row[:-1]) | (place[1:] != place[:-1])
        copy = new.cumsum(0) - 1
        copies, pairs = sizes.lists(0), sizes.lists(1)
        row_of_copy = row.new_empty(sum(copies[0]))
        row_of_copy[copy] = row  # pairs of one copy write the same
        before = _before(sizes.outgoing[:, 0])
        told = (copy - before[place]) * experts + wanted.experts[order] % experts
        heard = Passage(*pairs, group).exchange(told)
        after = _before(sizes.incoming[:, 0]).repeat_interleave(sizes.incoming[:, 1], output_size=sum(pairs[1]))
        arrived = Wanted(after + heard.div(experts, rounding_mode="floor"), heard % experts)
        return cls(Segments.of(row_of_copy, rows), order, inverse_permutation(order), copies, pairs, arrived)

    @property
    def arriving(self) -> int:
        """Counts the rows that arrive."""
        return sum(self.rows[1])


def _before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


class RowsOnHop:
    """The rows and weights of one call on one hop."""

    def __init__(self, hop: Hop, rows: Tensor, weights: Tensor, group: Group, *, in_fp8: bool):
        """Lets rows [n, dim] leave, and the pairs' weights fp32 [pairs]."""
        (rows_there, rows_here), pairs = hop.rows, hop.pairs
        self._hop = hop
        self._there, self._weights = Passage(rows_there, rows_here, group, in_fp8), Passage(*pairs, group)
        self._back = Passage(rows_here, rows_there, group)
        self._leaving = self._there.leave(repeat_rows(rows, hop.copies))
        self._leaving_weights = self._weights.leave(permute_rows(weights, hop.order, hop.back))
        self._returning: Tensor | None = None

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Waits for the rows [arriving, dim] that come here, and the weights of what is wanted of them."""
        return self._there.arrive(self._leaving), self._weights.arrive(self._leaving_weights)

    def send_back(self, rows: Tensor) -> None:
        """Lets one row [arriving, dim] leave for each that came."""
        self._returning = self._back.leave(rows)

    def add_up(self, added: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
        """Waits for what comes back, and adds it up by row, as `sum_rows` does: [n, dim]."""
        assert self._returning is not None
        return sum_rows(self._back.arrive(self._returning), self._hop.copies, added, stream)


@dataclass(frozen=True)
class OwnExperts:
    """The rows that arrive, by expert of this rank."""

    slots: Segments
    """The experts' inputs, by expert, of the rows that arrive."""
    order: Tensor
    """int64 [pairs]: the pairs by expert; `slots.by_row` is the inverse."""
    counts: Tensor
    """int64 [local experts]"""

    @classmethod
    def of(cls, hop: Hop, experts: int) -> "OwnExperts":
        """Sorts what is wanted after the last hop, of `experts` experts."""
        wanted = hop.wanted
        order = wanted.experts.to(torch.int16).argsort(stable=True)
        back = inverse_permutation(order)
        counts = order.new_zeros(experts).scatter_add_(0, wanted.experts, torch.ones_like(wanted.experts))
        return cls(Segments(wanted.row_of[order], back, bounds_of(wanted.row_of, hop.arriving)), order, counts)
