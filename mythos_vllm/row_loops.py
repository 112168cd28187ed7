"""A loop that some rows leave before others: rows of several requests lie side by side, each with a count of its own.

A row that has ended keeps its state h, and neither router nor experts see it. Attention runs for all rows, because
what an engine prepares for it is of the whole batch; what it writes for ended rows no request reads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mythos_hf.recurrent_mythos import MythosRecurrentBlock


def count_rows(loops: Sequence[int], tokens: Sequence[int], served: int) -> Tensor | None:
    """Spread each request's loops over its tokens: [tokens] on the CPU; None where all run the server's."""
    if all(count == served for count in loops):
        return None
    return torch.as_tensor(loops).long().repeat_interleave(torch.as_tensor(tokens).long())


def running_rows(counts: Tensor | None, n_loops: int, tokens: int, device: torch.device) -> list[Tensor | None]:
    """The rows that run in each loop that any row runs, as indices on the device; None: all of them.

    counts: [tokens or fewer] on the CPU, so that no loop waits for the device; rows beyond are filled ones, and run in
    no loop. None: all rows run n_loops.
    """
    if counts is None:
        return [None] * n_loops
    rows = [(counts > loop).nonzero().squeeze(1) for loop in range(int(counts.max()))]
    return [None if len(some) == tokens else some.to(device, non_blocking=True) for some in rows]


def at_rows(part: Callable[[Tensor, int], Tensor], x: Tensor, rows: Tensor | None, loop: int) -> Tensor:
    """part(x, loop) of some rows of x [tokens, dim], zero elsewhere; of all where rows is None."""
    if rows is None:
        return part(x, loop)
    out = part(x[rows], loop)
    return out.new_zeros(len(x), out.shape[-1]).index_copy(0, rows, out)


class RowLoops(MythosRecurrentBlock):
    """The looped layers for rows with counts of their own. The context of a forward is what the layers take, and
    `running_rows`."""

    def step(self, h: Tensor, e: Tensor, loop: int, context: Any) -> tuple[Tensor, ...]:
        """One loop of the rows that still run, [tokens, dim]: the others keep h, whatever the injection does to it."""
        stepped, *kept = super().step(h, e, loop, context)
        rows = context[1][loop]
        return (stepped if rows is None else h.index_copy(0, rows, stepped[rows])), *kept
