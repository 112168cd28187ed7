"""The bounds of documents in a micro-batch, in the forms that kernels take."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.permute import inverse_permutation


@dataclass(frozen=True)
class DocumentBounds:
    """The documents of a micro-batch as runs of its flattened [batch * seq] tokens."""

    cu_seqlens: Tensor
    """int32 [n + 1]: first flat position of each document, and the number of tokens; every sequence starts one."""
    order: Tensor
    """int64 [batch * seq]: flat positions sorted so that documents of one length lie together."""
    inverse: Tensor
    runs: tuple[tuple[int, int], ...]
    """(documents, length) for each length, in the order of `order`; the longest come last."""

    @property
    def longest(self) -> int:
        """The most tokens that a document has."""
        return self.runs[-1][1]

    @classmethod
    def from_positions(cls, positions: Tensor, device: torch.device | None = None) -> "DocumentBounds | None":
        """Reads bounds off positions int64 [batch, seq] that restart at 0; None where each sequence is one document.

        The tensors are put on `device` (None: that of positions). Only positions on the CPU are read without waiting
        for a GPU.
        """
        device = positions.device if device is None else device
        begins = positions.cpu() == 0
        begins[:, 0] = True
        if int(begins.sum()) == positions.shape[0]:
            return None
        starts = begins.flatten().nonzero().flatten()
        ends = functional.pad(starts[1:], (0, 1), value=positions.numel())
        lengths = ends - starts
        by_length = lengths.argsort(stable=True)
        distinct, counts = lengths.unique(return_counts=True)
        sorted_lengths = lengths[by_length]
        token_starts = starts[by_length].repeat_interleave(sorted_lengths, output_size=positions.numel())
        first = sorted_lengths.cumsum(0) - sorted_lengths
        first = first.repeat_interleave(sorted_lengths, output_size=positions.numel())
        order = token_starts + torch.arange(positions.numel()) - first
        runs = tuple(zip(counts.tolist(), distinct.tolist(), strict=True))
        bounds = functional.pad(starts, (0, 1), value=positions.numel()).int()
        return cls(bounds, order, inverse_permutation(order), runs).to(device)

    def to(self, device: torch.device) -> "DocumentBounds":
        """The same on `device`; nothing waits for the copies."""
        bounds, order, inverse = (x.to(device, non_blocking=True) for x in (self.cu_seqlens, self.order, self.inverse))
        return DocumentBounds(bounds, order, inverse, self.runs)
