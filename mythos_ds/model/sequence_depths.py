"""Sequences of different depth in one batch: which of them run in a loop, and under which loop index."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SequenceDepths:
    """The depths of sequences that run n_loops loops together, each a number of its own (Parcae, arXiv 2604.12946).

    All sequences end in the same loop, so that one coda reads them all: sequence i begins in loop n_loops - depths[i].
    Before that its state stays h_0, and what the block computes for it is not used and not counted. From then on it
    sees its own loop index, from 0, so that its result is the one it would have alone.
    """

    depths: Tensor
    """int64 [batch], 1 .. n_loops."""
    n_loops: int

    def split(self, parts: int) -> list["SequenceDepths"]:
        """The depths of equal parts of the sequences."""
        return [SequenceDepths(depths, self.n_loops) for depths in self.depths.chunk(parts)]

    def index(self, loop: int) -> Tensor:
        """Computes each sequence's own loop index in loop `loop`, int64 [batch]; 0 before it begins."""
        return (self.depths + (loop - self.n_loops)).clamp_min(0)

    def begun(self, loop: int) -> Tensor:
        """Says which sequences run in loop `loop`, bool [batch]."""
        return self.depths >= self.n_loops - loop

    def loss_weights(self, loop: int, n_grad_loops: int) -> Tensor:
        """Computes the weights of the sequences' auxiliary losses in loop `loop`, fp32 [batch], so that the mean over
        the last n_grad_loops loops is one over the loops with gradient that a sequence runs."""
        return self.begun(loop) * (n_grad_loops / self.depths.clamp_max(n_grad_loops))
