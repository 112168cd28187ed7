"""bf16 weights: the state is carried in fp32, and a much too large learning rate does not give infinities."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.config.loader import load_config
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.injection import Injection
from mythos_ds.model.loop_index import LoopIndex
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.router import Router, update_router_bias
from tests.helpers.toy_model import MLA, gradient, randomise, toy_batch, toy_config

TINY_LR = load_config("tiny.json").config.training.lr


def in_bfloat16(model: MythosModel) -> MythosModel:
    """Parameters in bf16; router buffers stay fp32, as in training."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def train(model: MythosModel, steps: int, lr: float) -> list[float]:
    """Losses of AdamW on fp32 copies of the weights, with gradient clipping and the router's balancing."""
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(steps):
        n_loops = (3, 5, 1, 2)[step % 4]
        aux = AuxLoss(balance=1e-3, z=1e-3)
        records = ForwardRecords()
        loss = model(**toy_batch(model.config, seed=step), n_loops=n_loops, n_grad_loops=2, aux=aux, records=records)
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        for layer in model.moe_layers():
            own = records.routing[layer.layer]
            counts = torch.stack([own[loop].counts for loop in range(n_loops)])
            update_router_bias(layer.router, counts, 1e-3)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "changes", [{}, MLA, {"injection": "post"}, {"state_dtype": "bfloat16"}, {"halting": "act"}], ids=str
)
def test_five_times_the_learning_rate_stays_finite(changes: dict[str, Any]) -> None:
    config = toy_config(recurrent_layers=1, **changes)
    model = in_bfloat16(MythosModel(config))
    losses = torch.tensor(train(model, 24, 5 * TINY_LR))
    assert losses.isfinite().all()
    assert losses.max() < 3 * losses[0]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    cap = 1 - 2**-8 if config.state_dtype == "bfloat16" else 1 - 1e-4
    assert model.recurrent.injection.decay().double().max() <= cap
    with torch.no_grad():
        deep = model(toy_batch(config)["tokens"], n_loops=32)
    assert deep.isfinite().all(), "far beyond the trained depth"


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("injection", ["pre", "post"])
def test_dtype_of_the_carried_state_and_of_the_router(state_dtype: str, injection: str) -> None:
    config = toy_config(state_dtype=state_dtype, injection=injection)
    model = in_bfloat16(randomise(MythosModel(config)))
    states: list[torch.dtype] = []
    streams: set[torch.dtype] = set()
    logits: set[torch.dtype] = set()

    def note_injection(module: Injection, inputs: tuple[Tensor, Tensor], out: Tensor) -> None:
        states.append(inputs[0].dtype)
        assert out.dtype == torch.float32

    def note_router(module: Router, inputs: tuple[Tensor, LoopIndex], out: Any) -> None:
        logits.add(out.logits.dtype)

    model.recurrent.injection.register_forward_hook(note_injection)
    for layer in model.recurrent.layers.values():
        layer.register_forward_hook(lambda module, inputs, out: streams.add(out[0].dtype))
    for moe_layer in model.moe_layers():
        moe_layer.router.register_forward_hook(note_router)
    model.recurrent.register_forward_hook(lambda module, inputs, out: streams.add(out.dtype))
    model(**toy_batch(config), n_loops=3).backward()
    assert states == [getattr(torch, state_dtype)] * 3
    assert streams == {torch.float32}, "residual stream of the block"
    assert logits == {torch.float32}
    assert all(gradient(parameter).dtype == torch.bfloat16 for parameter in model.parameters())


def test_bf16_stays_close_to_fp32() -> None:
    config = toy_config(n_experts_per_tok=8)  # all experts: no choice that rounding could flip
    batch = toy_batch(config)
    reference = randomise(MythosModel(config))
    expected = reference(**batch, n_loops=8)
    assert in_bfloat16(reference)(**batch, n_loops=8).item() == pytest.approx(expected.item(), rel=2e-2)
