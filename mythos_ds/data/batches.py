"""Micro-batches of one data-parallel rank. The position of a run is one number."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mythos_ds.errors import DataError, MythosError

Item = dict[str, NDArray[np.int64]]
Batch = dict[str, Tensor]
"""tokens, targets, positions: int64 [rows, seq]; targets are the next tokens. Of conversations also counted, int64
[rows]: how many targets of a row count in the loss; the others are -100. Where each sequence has its own depth, also
depths: int64 [rows]."""


class SampleSource(Protocol):
    """A dataset: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class BatchStream(Iterator[Batch]):
    """Iterates over micro-batches {name: int64 [micro_batch, seq]} from global sample `start_sample` on.

    Item j of micro-batch m is sample start_sample + m * (micro_batch_size * dp_size) + dp_rank *
    micro_batch_size + j: all ranks together read the samples in order, whatever their number, and a run goes
    on at any sample at no cost. Ends before the first micro-batch that some rank could not fill. num_workers
    > 0 reads ahead in that many processes.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        start_sample: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 0,
    ):
        if not (0 <= dp_rank < dp_size and start_sample >= 0 and micro_batch_size > 0):
            raise ValueError(f"{start_sample=} {micro_batch_size=} {dp_rank=} {dp_size=} fit no stream")
        step = micro_batch_size * dp_size
        first = start_sample + dp_rank * micro_batch_size
        last = len(dataset) - step - start_sample
        count = last // step + 1 if last >= 0 else 0
        indices = _MicroBatches(first, step, micro_batch_size, count)
        if num_workers:
            self._batches = _read_ahead(dataset, indices, num_workers)
        else:
            self._batches = (_stack([dataset[i] for i in batch]) for batch in indices)

    def __next__(self) -> Batch:
        return next(self._batches)


class _MicroBatches(Sampler[list[int]]):
    """Sample numbers of each micro-batch of one rank."""

    def __init__(self, first: int, step: int, size: int, count: int):
        self.first, self.step, self.size, self.count = first, step, size, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.count):
            start = self.first + number * self.step
            yield list(range(start, start + self.size))


def _read_ahead(dataset: SampleSource, indices: _MicroBatches, num_workers: int) -> Iterator[Batch]:
    # With a generator of its own: the loader would else advance torch's global one.
    loader: Any = DataLoader(
        _ErrorsAsItems(dataset),  # type: ignore[arg-type]
        batch_sampler=indices,
        collate_fn=_stack_or_error,
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    try:
        for batch in loader:
            if isinstance(batch, MythosError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads data was killed ({error}), most likely for want of memory; "
            f"data.num_workers {num_workers} given: allowed are fewer, or 0",
            code="MDS426",
        ) from error


class _ErrorsAsItems:
    """Hands an error of the data on as an item: the loader would hand on its traceback as the message."""

    def __init__(self, dataset: SampleSource):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Item | MythosError:
        try:
            return self._dataset[index]
        except MythosError as error:
            return error


def _stack_or_error(items: list[Item | MythosError]) -> Batch | MythosError:
    for item in items:
        if isinstance(item, MythosError):
            return item
    return _stack([item for item in items if not isinstance(item, MythosError)])


def _stack(items: list[Item]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}
