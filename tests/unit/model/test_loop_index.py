"""The index of a loop: sequences with numbers of their own get what each would get alone."""

import torch

from mythos_ds.kernels.injection import sinusoid
from mythos_ds.model.loop_index import LoopIndex

OWN = torch.tensor([0, 3, 5])


def test_own_numbers_give_each_sequence_what_one_number_gives() -> None:
    table = torch.randn(7, 4)
    index = LoopIndex(9, OWN)
    for position, number in enumerate(OWN.tolist()):
        alone = LoopIndex(number)
        assert torch.equal(index.pick(table)[position, 0], alone.pick(table))
        assert torch.equal(index.held(4).pick(table)[position, 0], alone.held(4).pick(table))
        assert torch.equal(sinusoid(index.value, 5, OWN.device)[position, 0], sinusoid(alone.value, 5, OWN.device))


def test_numbers_are_repeated_for_tokens() -> None:
    repeated = LoopIndex(0, OWN).by_token(6).own
    assert repeated is not None
    assert repeated.tolist() == [0, 0, 3, 3, 5, 5]
    assert LoopIndex(2).by_token(6) == LoopIndex(2)
