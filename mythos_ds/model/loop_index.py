"""The index of a loop as the model sees it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LoopIndex:
    """The number of a loop, from 0: one for all sequences, or, with a depth per sequence, each one's own.

    One number stays a Python int: where it is all there is, no kernel runs for it and the host waits for no device.
    """

    number: int
    own: Tensor | None = None
    """int64 [batch] (or [tokens]): the sequences' own numbers, which then stand in the place of `number`."""

    def held(self, last: int) -> "LoopIndex":
        """Holds the index at `last`."""
        return LoopIndex(min(self.number, last), None if self.own is None else self.own.clamp_max(last))

    def by_token(self, n_tokens: int) -> "LoopIndex":
        """Repeats the sequences' own numbers for each of the n_tokens flattened tokens."""
        return self if self.own is None else LoopIndex(self.number, repeat_by_token(self.own, n_tokens))

    @property
    def value(self) -> Tensor | int:
        """The number, or the sequences' own."""
        return self.number if self.own is None else self.own

    def pick(self, table: Tensor) -> Tensor:
        """Takes the index's row of a table [rows, width]: [width], or [batch, 1, width]."""
        return table[self.number] if self.own is None else table[self.own][:, None]


def repeat_by_token(values: Tensor, n_tokens: int) -> Tensor:
    """Repeats values [batch] of the sequences for each of their tokens: [n_tokens]."""
    return values[:, None].expand(-1, n_tokens // len(values)).flatten()
