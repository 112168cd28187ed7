"""Inspection of routing: overlaps of sets made by hand, and a model against its own records."""

import json
import math
from pathlib import Path

import pytest
import torch

from mythos_ds.analysis import routing
from mythos_ds.lab.studies.language import base, configuration
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel

CONFIG = configuration({**base("cpu"), "model.recurrent_layers": 2}).model
T = CONFIG.mean_recurrence


def _batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "positions": torch.arange(40).expand(2, -1)}


def _model() -> MythosModel:
    model = MythosModel(CONFIG, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_overlaps_of_sets_made_by_hand() -> None:
    first = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    last = torch.tensor([[1, 0], [2, 0], [6, 7], [5, 4]])  # same, one in common, disjoint, disjoint
    found = routing.overlaps([first, last], 8)
    assert found["overlap"] == [[1.0, pytest.approx((1 + 1 / 3) / 4)], [pytest.approx((1 + 1 / 3) / 4), 1.0]]
    assert (found["same_set"], found["disjoint_set"]) == (0.25, 0.5)
    assert found["overlap_other_token"][0][0] == 0.0, "no two tokens share an expert, and none meets itself"
    assert found["overlap_random"][0][0] == pytest.approx(0.5 / 3.5)  # 2 of 8: 4 / 8 in common on average


def test_random_sets_overlap_as_expected_of_their_loads() -> None:
    weights = torch.arange(1.0, 13.0)
    generator = torch.Generator().manual_seed(0)
    sets = [torch.multinomial(weights.expand(20_000, -1), 3, generator=generator) for _ in range(2)]
    found = routing.overlaps(sets, 12)
    assert found["overlap"][0][1] == pytest.approx(found["overlap_other_token"][0][1], abs=0.005)
    assert found["overlap"][0][1] == pytest.approx(found["overlap_random"][0][1], abs=0.03)


def test_measure_agrees_with_the_records_of_a_forward() -> None:
    model, batches = _model(), [_batch(0), _batch(1)]
    found = routing.measure(model, batches)
    assert found == json.loads(json.dumps(found))
    assert not model.moe_layers()[0].router._forward_hooks
    counts, entropies = torch.zeros(2, T, CONFIG.n_experts), torch.zeros(2, T)
    for batch in batches:
        records = ForwardRecords(details=True)
        with torch.no_grad():
            model(batch["tokens"], n_loops=T, positions=batch["positions"], records=records)
        for layer in range(2):
            for loop in range(T):
                own = records.routing[layer][loop]
                counts[layer, loop] += own.counts
                assert own.entropy is not None
                entropies[layer, loop] += own.entropy / 2
    for layer, own in enumerate(found["layers"]):
        load = counts[layer] / counts[layer].sum(-1, keepdim=True)
        assert torch.allclose(torch.tensor(own["load"]), load, atol=1e-6)
        assert torch.allclose(torch.tensor(own["mean_entropy"]), entropies[layer], atol=1e-5)
        assert own["moved_by_bias"] == [0.0] * T, "there is no bias yet"
        assert all(m <= e + 1e-6 <= math.log(CONFIG.n_experts) + 2e-6
                   for m, e in zip(own["mean_entropy"], own["entropy_of_mean"], strict=True))  # fmt: skip


def test_a_bias_moves_the_load_and_leaves_experts_dead(tmp_path: Path) -> None:
    model = _model()
    model.moe_layers()[1].router.bias[: CONFIG.n_experts_per_tok] = 100.0
    plain, biased = routing.measure(model, [_batch(0)], n_loops=2 * T)["layers"]
    k = CONFIG.n_experts_per_tok
    assert biased["dead_experts"] == [CONFIG.n_experts - k] * (2 * T)
    assert biased["max_over_mean"] == pytest.approx([CONFIG.n_experts / k] * (2 * T))
    assert min(biased["moved_by_bias"]) > 0.2
    assert biased["same_set"] == 1.0
    assert max(plain["dead_experts"]) < CONFIG.n_experts - k
    pytest.importorskip("matplotlib")
    routing.draw(routing.measure(model, [_batch(0)]), tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000
