"""The batch stream: the position is a number, the order knows no world size."""

import numpy as np
import pytest
import torch

from mythos_ds.data.batches import BatchStream

SEQ = 4


class Numbered:
    """Sample i holds i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {
            "tokens": np.full(SEQ, index, dtype=np.int64),
            "targets": np.full(SEQ, index + 1, dtype=np.int64),
        }


def samples(stream):
    return [batch["tokens"][:, 0].tolist() for batch in stream]


def global_order(length, dp_size, micro_batch_size, start=0, **options):
    """Samples of all ranks, micro-batch by micro-batch."""
    streams = [
        samples(
            BatchStream(
                Numbered(length),
                start_sample=start,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
                **options,
            )
        )
        for rank in range(dp_size)
    ]
    return [sample for step in zip(*streams, strict=True) for batch in step for sample in batch]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("start", [0, 8, 13])
def test_order_is_that_of_the_samples(dp_size, micro_batch_size, start):
    step = dp_size * micro_batch_size
    end = start + (50 - start) // step * step
    assert global_order(50, dp_size, micro_batch_size, start) == list(range(start, end))


def test_resume_continues_the_sequence():
    whole = BatchStream(Numbered(64), start_sample=0, micro_batch_size=2, dp_rank=1, dp_size=2)
    resumed = BatchStream(Numbered(64), start_sample=5 * 4, micro_batch_size=2, dp_rank=1, dp_size=2)
    assert samples(whole)[5:] == samples(resumed)


def test_worker_processes_give_the_same_and_leave_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read_ahead = global_order(30, 2, 3, 2, num_workers=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert read_ahead == global_order(30, 2, 3, 2)


def test_batches_are_tensors():
    stream = BatchStream(Numbered(8), start_sample=0, micro_batch_size=2, dp_rank=0, dp_size=1)
    batch = next(stream)
    assert batch["tokens"].dtype == torch.int64
    assert batch["targets"].tolist() == [[1] * SEQ, [2] * SEQ]


@pytest.mark.parametrize(("length", "start"), [(7, 0), (8, 1), (0, 0), (8, 100)])
def test_ends_before_a_step_that_some_rank_cannot_fill(length, start):
    for rank in range(2):
        stream = BatchStream(Numbered(length), start_sample=start, micro_batch_size=4, dp_rank=rank, dp_size=2)
        with pytest.raises(StopIteration):
            next(stream)


def test_rank_outside_the_world():
    with pytest.raises(ValueError, match="dp_rank=2"):
        BatchStream(Numbered(8), start_sample=0, micro_batch_size=1, dp_rank=2, dp_size=2)
