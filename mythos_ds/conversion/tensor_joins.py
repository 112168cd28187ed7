"""How one tensor is made of several, and taken apart again, a few rows at a time.

A conversion declares rows (target, its sources, how they are joined) once; both directions follow from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mythos_ds.errors import TensorMismatchError
from mythos_ds.weights.reader import TensorSource, TensorSpec

Shape = tuple[int, ...]
Read = Callable[[slice], Tensor]
"""Rows start:stop of the first dimension."""


class Join(Protocol):
    """A bijection between the parts and the whole."""

    def whole(self, parts: Sequence[Shape]) -> Shape:
        """Shape of the whole."""

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        """Rows of the whole."""

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        """Rows of part `index`; `shapes` are those of the parts."""


@dataclass(frozen=True)
class Same:
    """One part, unchanged."""

    def whole(self, parts: Sequence[Shape]) -> Shape:
        return parts[0]

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        return parts[0](rows)

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        return whole(rows)


@dataclass(frozen=True)
class Flat:
    """A matrix of one row [1, n] as a vector [n]."""

    def whole(self, parts: Sequence[Shape]) -> Shape:
        return parts[0][1:]

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        return parts[0](slice(0, 1))[0, rows]

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        return whole(slice(0, shapes[0][1]))[None][rows]


@dataclass(frozen=True)
class Transposed:
    """A small matrix turned over: it is read whole."""

    def whole(self, parts: Sequence[Shape]) -> Shape:
        return parts[0][::-1]

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        return parts[0](slice(0, shapes[0][0])).t()[rows]

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        return whole(slice(0, shapes[0][1])).t()[rows]


@dataclass(frozen=True)
class Stacked:
    """Equal parts under a new first dimension."""

    def whole(self, parts: Sequence[Shape]) -> Shape:
        return (len(parts), *parts[0])

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        return torch.stack([parts[i](slice(0, shapes[i][0])) for i in range(rows.start, rows.stop)])

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        return whole(slice(index, index + 1))[0, rows]


@dataclass(frozen=True)
class OnRows:
    """Parts below each other."""

    def whole(self, parts: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in parts), *parts[0][1:])

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        pieces, first = [], 0
        for read, shape in zip(parts, shapes, strict=True):
            start, stop = max(rows.start - first, 0), min(rows.stop - first, shape[0])
            if start < stop:
                pieces.append(read(slice(start, stop)))
            first += shape[0]
        return torch.cat(pieces)

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        first = sum(shape[0] for shape in shapes[:index])
        return whole(slice(first + rows.start, first + rows.stop))


@dataclass(frozen=True)
class OnColumns:
    """Matrices beside each other."""

    def whole(self, parts: Sequence[Shape]) -> Shape:
        return parts[0][0], sum(shape[1] for shape in parts)

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        return torch.cat([read(rows) for read in parts], dim=1)

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        first = sum(shape[1] for shape in shapes[:index])
        return whole(rows)[:, first : first + shapes[index][1]]


@dataclass(frozen=True)
class InHeads:
    """Rows of several matrices, interleaved head by head."""

    n_heads: int

    def whole(self, parts: Sequence[Shape]) -> Shape:
        return OnRows().whole(parts)

    def join(self, parts: Sequence[Read], shapes: Sequence[Shape], rows: slice) -> Tensor:
        widths = self._widths(shapes)
        first, last = self._heads(rows, sum(widths))
        own = [
            read(slice(first * width, last * width)).unflatten(0, (-1, width))
            for read, width in zip(parts, widths, strict=True)
        ]
        start = first * sum(widths)
        return torch.cat(own, dim=1).flatten(0, 1)[rows.start - start : rows.stop - start]

    def part(self, whole: Read, shapes: Sequence[Shape], index: int, rows: slice) -> Tensor:
        widths = self._widths(shapes)
        width, before = widths[index], sum(widths[:index])
        first, last = self._heads(rows, width)
        heads = whole(slice(first * sum(widths), last * sum(widths))).unflatten(0, (-1, sum(widths)))
        start = first * width
        return heads[:, before : before + width].flatten(0, 1)[rows.start - start : rows.stop - start]

    def _widths(self, shapes: Sequence[Shape]) -> list[int]:
        return [shape[0] // self.n_heads for shape in shapes]

    @staticmethod
    def _heads(rows: slice, width: int) -> tuple[int, int]:
        return rows.start // width, -(-rows.stop // width)


@dataclass(frozen=True)
class Row:
    """A tensor of the target format, its sources by name, and how they make it."""

    target: str
    sources: tuple[str, ...]
    join: Join


class Joined:
    """The targets of `rows`, from a source of their parts. Raises CheckpointError for a missing part."""

    def __init__(self, source: TensorSource, rows: Sequence[Row]):
        self.source, self.rows = source, {row.target: row for row in rows}
        specs = source.specs()
        for name in (name for row in rows for name in row.sources):
            if name not in specs:
                raise TensorMismatchError(f"{name}: not in the given weights")
        self._parts = {row.target: [specs[name] for name in row.sources] for row in rows}

    def specs(self) -> dict[str, TensorSpec]:
        """Every target, with the type of its first part."""
        return {
            name: TensorSpec(parts[0].dtype, self.rows[name].join.whole([part.shape for part in parts]))
            for name, parts in self._parts.items()
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A target or some of its rows."""
        row, shapes = self.rows[name], [part.shape for part in self._parts[name]]
        parts = [_reader(self.source, each) for each in row.sources]
        return row.join.join(parts, shapes, rows or slice(0, row.join.whole(shapes)[0]))


class Parted:
    """The parts of `rows`, from a source of their targets; `shapes` are those of all parts."""

    def __init__(self, source: TensorSource, rows: Sequence[Row], shapes: dict[str, Shape]):
        self.source = source
        self._places = {name: (row, i) for row in rows for i, name in enumerate(row.sources)}
        self._shapes = {name: tuple(shapes[name]) for name in self._places}
        specs = source.specs()
        for row in rows:
            if row.target not in specs:
                raise TensorMismatchError(f"{row.target}: not in the given weights")
            whole = row.join.whole([self._shapes[name] for name in row.sources])
            if specs[row.target].shape != whole:
                raise TensorMismatchError(f"{row.target}: has the shape {specs[row.target].shape}, expected {whole}")
        self._types = {name: specs[row.target].dtype for name, (row, _) in self._places.items()}

    def specs(self) -> dict[str, TensorSpec]:
        """Every part, with the type of its target."""
        return {name: TensorSpec(self._types[name], shape) for name, shape in self._shapes.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A part or some of its rows."""
        row, index = self._places[name]
        shapes = [self._shapes[each] for each in row.sources]
        return row.join.part(_reader(self.source, row.target), shapes, index, rows or slice(0, shapes[index][0]))


def _reader(source: TensorSource, name: str) -> Read:
    return lambda rows: source.read(name, rows)
