"""Attention is computed by what the model is given, in every layer and loop."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mythos_ds.kernels.attention import causal_attention
from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.pipeline_stage import StageModel
from tests.helpers.toy_model import MLA, randomise, toy_batch, toy_config

LOOPS = 3


def masked_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: DocumentBounds | None) -> Tensor:
    """The plain form: a dense mask of what each token may see."""
    batch, seq, heads, _ = q.shape
    document = torch.zeros(batch, seq, dtype=torch.int64)
    if documents is not None:
        document.view(-1)[documents.cu_seqlens[:-1].long()] = 1
        document = document.view(-1).cumsum(0).view(batch, seq)
    seen = torch.ones(seq, seq).tril().bool() & (document[:, :, None] == document[:, None, :])
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhw,bkhw->bhqk", q, k) * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhw->bqhw", weights, v)


@pytest.mark.parametrize("changes", [{}, MLA], ids=["gqa", "mla"])
def test_another_core_computes_the_same(changes: dict[str, Any]) -> None:
    config = toy_config(**changes)
    batch = toy_batch(config)
    models = (MythosModel(config), MythosModel(config, attention_core=masked_attention))
    own, other = (randomise(model)(batch["tokens"], n_loops=LOOPS, positions=batch["positions"]) for model in models)
    assert torch.allclose(own, other, atol=1e-5)
    assert not torch.equal(own, other), "the given core ran"


@pytest.mark.parametrize("kind", [MythosModel, StageModel])
def test_every_layer_calls_the_core(kind: type[MythosModel]) -> None:
    calls: list[tuple[int, ...]] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return causal_attention(q, k, v, **options)

    config = toy_config()
    model = kind(config, attention_core=counting)
    MythosModel.forward(model, toy_batch(config)["tokens"], n_loops=LOOPS)
    assert calls == [(3, 20, 4, 8)] * (1 + 2 * LOOPS + 1)


class ScaledCore(nn.Module):
    """A core that is a module, with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: DocumentBounds | None) -> Tensor:
        return causal_attention(q * self.weight, k, v, scale=scale, documents=documents)


@pytest.mark.parametrize("changes", [{}, MLA], ids=["gqa", "mla"])
def test_a_core_that_is_a_module_is_no_part_of_the_model(changes: dict[str, Any]) -> None:
    config = toy_config(**changes)
    plain, other = MythosModel(config), MythosModel(config, attention_core=ScaledCore())
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in other.named_modules()]
    tokens = toy_batch(config)["tokens"]
    assert torch.equal(plain(tokens, n_loops=LOOPS), other(tokens, n_loops=LOOPS))
