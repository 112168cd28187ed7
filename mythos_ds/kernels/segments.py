"""The bounds of documents in a micro-batch, in the forms that kernels take."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.permute import inverse_permutation


@dataclass(frozen=True)
class DocumentBounds:
    """The documents of a micro-batch as runs of its flattened [batch * seq] tokens."""

    starts: Tensor
    """int64 [n]: first flat position of each document; every sequence starts one."""
    lengths: Tensor
    """int64 [n]."""
    order: Tensor
    """int64 [batch * seq]: flat positions sorted so that documents of one length lie together."""
    inverse: Tensor
    runs: tuple[tuple[int, int], ...]
    """(documents, length) for each length, in the order of `order`."""

    @classmethod
    def from_positions(cls, positions: Tensor) -> "DocumentBounds | None":
        """Reads bounds off positions int64 [batch, seq] that restart at 0; None where each sequence is one document."""
        begins = positions == 0
        begins[:, 0] = True
        if int(begins.sum()) == positions.shape[0]:
            return None
        starts = begins.flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([positions.numel()])])
        lengths = ends - starts
        by_length = lengths.argsort(stable=True)
        distinct, counts = lengths.unique(return_counts=True)
        token_starts = starts[by_length].repeat_interleave(lengths[by_length])
        sorted_lengths = lengths[by_length]
        first = (sorted_lengths.cumsum(0) - sorted_lengths).repeat_interleave(sorted_lengths)
        order = token_starts + torch.arange(positions.numel(), device=positions.device) - first
        runs = tuple(zip(counts.tolist(), distinct.tolist(), strict=True))
        return cls(starts, lengths, order, inverse_permutation(order), runs)

    def cu_seqlens(self) -> Tensor:
        """Sums the lengths up, int32 [n + 1], as variable-length kernels take them."""
        return functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
