"""The head: logits, or the loss of its own logits."""

import pytest
import torch
from torch.nn import functional

from mythos_ds.model.initializer import Initializer
from mythos_ds.model.lm_head import LMHead
from tests.helpers.toy_model import toy_config


@pytest.mark.parametrize("tied", [True, False])
def test_head_gives_the_loss_of_its_own_logits(tied: bool) -> None:
    config = toy_config()
    own = torch.nn.Parameter(torch.randn(config.vocab_size, config.dim)) if tied else None
    head = LMHead(config, Initializer(0).at("lm_head"), own)
    assert (head.weight is own) == tied
    hidden, targets = torch.randn(2, 9, config.dim), torch.randint(0, config.vocab_size, (2, 9))
    logits = head(hidden)
    assert logits.shape == (2, 9, config.vocab_size)
    assert logits.dtype == torch.float32
    assert torch.allclose(head(hidden, targets), functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
