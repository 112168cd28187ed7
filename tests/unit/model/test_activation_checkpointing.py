"""Recomputing loops, or their layers, in backward changes nothing: loss, gradients and counts are bitwise the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.config.schema import ActivationCheckpointing
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.steps import Steps
from tests.helpers.toy_model import MLA, randomise, toy_batch, toy_config

LORA: dict[str, Any] = {"lora_target": "output", "lora_rank": 2, "recurrent_layers": 3}
ACT: dict[str, Any] = {"halting": "act", "act_threshold": 0.8}


def run(
    changes: dict[str, Any], unit: ActivationCheckpointing, n_loops: int, n_grad_loops: int | None
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss, gradients and counts after backward."""
    config = toy_config(**changes)
    model = randomise(MythosModel(config, activation_checkpointing=unit))
    records = ForwardRecords(details=True)
    aux = AuxLoss(balance=0.3, z=0.02, ponder=0.1, scale=0.5)
    loss = model(**toy_batch(config), n_loops=n_loops, n_grad_loops=n_grad_loops, aux=aux, records=records)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    counts = []
    for own in records.routing.values():
        for loop in range(n_loops):
            prebias_counts = own[loop].prebias_counts
            assert prebias_counts is not None
            counts.append(torch.stack([own[loop].counts, prebias_counts]))
    return loss.detach(), gradients, counts


@pytest.mark.parametrize("unit", ["layer", "loop"])
@pytest.mark.parametrize("changes", [{}, MLA, LORA, {"injection": "post"}, ACT, {**ACT, **MLA}], ids=str)
@pytest.mark.parametrize(("n_loops", "n_grad_loops"), [(5, 2), (4, None), (3, 1)])
def test_bitwise_equal(
    changes: dict[str, Any], n_loops: int, n_grad_loops: int | None, unit: ActivationCheckpointing
) -> None:
    loss, gradients, counts = run(changes, "none", n_loops, n_grad_loops)
    again, recomputed, counted = run(changes, unit, n_loops, n_grad_loops)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name
    assert all(torch.equal(a, b) for a, b in zip(counts, counted, strict=True))


def test_only_loops_with_gradient_are_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[tuple[int, int]] = []
    steps = MoE.steps

    def counting(self: MoE, x: Tensor, loop: int, *rest: Any) -> Steps[Tensor]:
        visited.append((loop, self.layer))
        return steps(self, x, loop, *rest)

    monkeypatch.setattr(MoE, "steps", counting)
    forwards = [(loop, layer) for loop in range(5) for layer in range(3)]
    run({"recurrent_layers": 3}, "loop", 5, 2)
    assert visited == [*forwards, *((loop, layer) for loop in (4, 3) for layer in range(3))]
    visited.clear()
    run({"recurrent_layers": 3}, "layer", 5, 2)
    assert visited == [*forwards, *((loop, layer) for loop in (4, 3) for layer in (2, 1, 0))]
    visited.clear()
    run({"recurrent_layers": 3}, "none", 5, 2)
    assert visited == forwards


def test_memory_held_for_backward_hardly_grows_with_loops() -> None:
    """By layer, a state for each layer and loop; by loop, one for each loop."""

    def saved(unit: ActivationCheckpointing, n_loops: int) -> int:
        config = toy_config()
        model = MythosModel(config, activation_checkpointing=unit)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**toy_batch(config), n_loops=n_loops)
        loss.backward()
        return sum(sizes.values())

    units: list[ActivationCheckpointing] = ["none", "layer", "loop"]
    none, layer, loop = (saved(unit, 9) - saved(unit, 3) for unit in units)
    assert loop < none / 10
    assert layer < none / 5
    assert layer == toy_config().recurrent_layers * loop
