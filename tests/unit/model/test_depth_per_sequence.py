"""A depth for each sequence: the batch trains as its sequences alone would, each at its own depth."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.config.layout import RankLayout
from mythos_ds.config.schema import ActivationCheckpointing
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from mythos_ds.train.trainer import with_depths
from tests.helpers.toy_model import MLA, randomise, toy_batch, toy_config

AUX = AuxLoss(balance=0.3, z=0.2)
DEPTHS = torch.tensor([1, 3, 6])
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"injection": "post"},
    "starts_from_e": {"initial_state": "embedding"},
    "latent": MLA,
    "raw_output": {"loop_embedding": "raw", "lora_target": "output"},
}


def toy(unit: ActivationCheckpointing = "none", **changes: Any) -> MythosModel:
    """Every weight moved, also the loop embedding's gain, LoRA's scale and the routers' biases."""
    return randomise(MythosModel(toy_config(**changes), activation_checkpointing=unit))


def gradients(model: MythosModel) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def alone(
    model: MythosModel, batch: dict[str, Tensor], depths: Tensor, n_grad_loops: int | None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Mean loss and its gradients over sequences run one by one; tokens by layer, own loop and expert."""
    counts = torch.zeros(model.config.recurrent_layers, int(depths.max()), model.config.n_experts)
    losses = []
    for row, depth in enumerate(depths.tolist()):
        own = {name: value[row : row + 1] for name, value in batch.items()}
        records = ForwardRecords()
        loss = model(**own, n_loops=depth, n_grad_loops=n_grad_loops, aux=AUX, records=records)
        loss.backward()
        losses.append(loss.detach())
        for layer, by_loop in records.routing.items():
            for loop, record in by_loop.items():
                counts[layer, loop] += record.counts
    return torch.stack(losses).mean(), {name: g / len(depths) for name, g in gradients(model).items()}, counts


@pytest.mark.parametrize("n_grad_loops", [None, 2, 4])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("unit", ["none", "layer", "loop"])
def test_equals_the_sequences_alone(name: str, n_grad_loops: int | None, unit: ActivationCheckpointing) -> None:
    """With auxiliary losses, biased routers, and a sequence that ends before the loops with gradient are through."""
    model = toy(unit, **VARIANTS[name])
    batch = toy_batch(model.config)
    expected, wanted, counts = alone(model, batch, DEPTHS, n_grad_loops)
    records = ForwardRecords(details=True)
    loss = model(**batch, n_loops=6, n_grad_loops=n_grad_loops, aux=AUX, records=records, depths=DEPTHS)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    found = gradients(model)
    assert any(gradient.any() for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-6), key
    for layer, by_loop in records.routing.items():
        assert torch.equal(sum(record.counts for record in by_loop.values()), counts[layer])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_depths_change_nothing(name: str) -> None:
    model = toy(**VARIANTS[name])
    batch = toy_batch(model.config)
    results = []
    for depths in (None, torch.full((3,), 5)):
        records = ForwardRecords(details=True)
        loss = model(**batch, n_loops=5, n_grad_loops=3, aux=AUX, records=records, depths=depths)
        loss.backward()
        results.append((loss.detach(), gradients(model), records))
    (loss, expected, notes), (again, found, own_notes) = results
    assert torch.equal(loss, again)
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=1e-6, atol=1e-7), key
    for loop in range(5):
        assert torch.equal(own_notes.routing[0][loop].counts[loop], notes.routing[0][loop].counts)
        for field in ("balance", "z", "entropy", "overlap_previous"):
            value, own = (getattr(n.routing[0][loop], field) for n in (notes, own_notes))
            assert value is own is None or torch.allclose(own, value), field
        for field in ("state_rms", "residual"):
            assert torch.allclose(getattr(own_notes.loops[loop], field), getattr(notes.loops[loop], field))


def test_what_is_noted_is_of_sequences_that_have_begun() -> None:
    """Until the second one begins, the notes are those of the first alone."""
    model = toy()
    batch = {name: value[:2] for name, value in toy_batch(model.config).items()}
    both, first = ForwardRecords(details=True), ForwardRecords(details=True)
    model(**batch, n_loops=6, aux=AUX, records=both, depths=torch.tensor([6, 2]))
    model(**{name: value[:1] for name, value in batch.items()}, n_loops=6, aux=AUX, records=first)
    for loop in range(4):
        found, expected = both.routing[1][loop], first.routing[1][loop]
        assert torch.equal(found.counts[loop], expected.counts)
        assert found.prebias_counts is not None
        assert expected.prebias_counts is not None
        assert torch.equal(found.prebias_counts[loop], expected.prebias_counts)
        for field in ("balance", "z", "entropy", *(["overlap_previous"] if loop else [])):
            assert torch.allclose(getattr(found, field), getattr(expected, field)), field
        assert torch.allclose(both.loops[loop].state_rms, first.loops[loop].state_rms)
        assert torch.allclose(both.loops[loop].residual, first.loops[loop].residual)
    # A sequence has no loop before its first one.
    assert torch.allclose(both.routing[1][4].overlap_previous, first.routing[1][4].overlap_previous)  # type: ignore[arg-type]


def test_a_sequence_does_not_feel_the_others() -> None:
    model = toy()
    batch = toy_batch(model.config)
    with torch.no_grad():
        one = model(batch["tokens"], n_loops=6, positions=batch["positions"], depths=DEPTHS)
        other = model(batch["tokens"], n_loops=5, positions=batch["positions"], depths=torch.tensor([5, 3, 2]))
    assert torch.allclose(one[1], other[1], atol=1e-5)
    assert not torch.allclose(one[2], other[2], atol=1e-2)


def test_depths_that_do_not_fit_are_refused() -> None:
    tokens = toy_batch(toy_config())["tokens"]
    with pytest.raises(ValueError, match="depths"):
        toy()(tokens, n_loops=6, depths=DEPTHS[:2])
    with pytest.raises(ValueError, match="ACT"):
        toy(halting="act")(tokens, n_loops=6, depths=DEPTHS)


def test_rows_get_the_depths_of_their_samples() -> None:
    """Row j of micro-batch m on rank r is sample m * rows * ranks + r * rows + j of the step."""
    batches = [{"tokens": torch.zeros(2, 4)} for _ in range(3)]
    depths = tuple(range(24))
    own = [batch["depths"].tolist() for batch in with_depths(batches, depths, RankLayout(1, (4,)))]
    assert own == [[2, 3], [10, 11], [18, 19]]
