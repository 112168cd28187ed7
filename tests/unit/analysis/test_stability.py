"""Inspection of the state: maps whose norm, radius and fate are known, and a model against its whole Jacobian."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.analysis import stability
from mythos_ds.analysis.stability import classify, directional, follow, plane, smooth, spectral_norm
from mythos_ds.errors import LabError
from mythos_ds.lab.studies.language import base, configuration
from mythos_ds.model.mythos import MythosModel

CONFIG = configuration({**base("cpu"), "model.mean_recurrence": 2}).model
T = CONFIG.mean_recurrence


def _batch(rows: int = 2, seq: int = 6) -> dict[str, torch.Tensor]:
    tokens = torch.arange(rows * seq).view(rows, seq) * 37 % CONFIG.vocab_size
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "positions": torch.arange(seq).expand(rows, -1)}


def _model(scale: float = 0.05, **changes: object) -> MythosModel:
    """Weights away from the start, where output projections are zero and only the injection acts."""
    model = MythosModel(CONFIG.model_copy(update=changes), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def _matrix(singular: list[float]) -> torch.Tensor:
    torch.manual_seed(0)
    n = len(singular)
    left, right = (torch.linalg.qr(torch.randn(n, n))[0] for _ in range(2))
    return left @ torch.diag(torch.tensor(singular)) @ right


def test_norm_of_a_linear_map_is_its_largest_singular_value() -> None:
    matrix = _matrix([3.0, 1.5, 0.5, 0.1])
    norm, change = spectral_norm(lambda h: h @ matrix.t(), torch.randn(2, 5, 4), iterations=30)
    assert norm == pytest.approx(3.0, rel=1e-3)
    assert change < 1e-3


def test_a_direction_at_a_curved_place_is_the_derivative() -> None:
    h, v = torch.linspace(-1, 1, 12).view(1, 3, 4), torch.ones(1, 3, 4)
    assert torch.allclose(directional(torch.tanh, h, v), 1 - torch.tanh(h) ** 2, atol=1e-3)
    assert torch.allclose(directional(lambda x: 2 * x, torch.zeros(4), torch.ones(4)), torch.full((4,), 2.0))


def _rotation(period: int) -> torch.Tensor:
    angle = 2 * math.pi / period
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def test_settling_cycling_and_drifting_are_told_apart() -> None:
    maps = [lambda h: 0.5 * h + 1.0, *(lambda h, p=p: h @ _rotation(p).t() for p in (2, 5, 8)), lambda h: h + 1.0]
    maps.append(lambda h: h @ _rotation(37).t())

    def step(h: torch.Tensor, loop: int) -> torch.Tensor:
        return torch.stack([own(row) for own, row in zip(maps, h, strict=True)])

    seen = follow(step, torch.tensor([[1.0, 0.3]] * len(maps)), 48)
    kind, period = classify(seen.residual[-1], seen.returned)
    assert [stability.KINDS[i] for i in kind] == ["settle", "cycle", "cycle", "cycle", "drift", "drift"]
    assert period[1:4].tolist() == [2, 5, 8]
    assert seen.cosine[-1, 2].item() == pytest.approx(math.cos(2 * math.pi / 5), abs=1e-5)
    assert seen.mean_square[-1, 2].item() == pytest.approx((1 + 0.09) / 2, rel=1e-4)


def test_orbits_are_seen_in_their_own_plane() -> None:
    angle = torch.linspace(0, 6, 40, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(16, 2, dtype=torch.float64))[0]
    points = torch.stack([2 * angle.cos(), angle.sin()], 1) @ axes.t() + 5.0
    coordinates, explained = plane(points)
    assert explained == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(torch.cdist(coordinates, coordinates), torch.cdist(points, points), atol=1e-3)
    assert plane(torch.ones(1, 5))[0].shape == (1, 2)


def test_a_model_whose_layers_are_zero_has_the_norm_of_A() -> None:
    model = MythosModel(CONFIG, seed=0).eval()
    with torch.no_grad():
        model.recurrent.injection.log_A[7] -= 1.0  # one channel forgets more slowly
    found = stability.measure(model, [_batch()], iterations=40)
    radius = found["spectral_radius_A"]
    assert radius == pytest.approx(float(model.recurrent.injection.decay().detach().max()))
    assert found["jacobian"]["norm"] == pytest.approx([radius] * 4, rel=1e-3)
    assert found["growth"]["by_loop"][-1] == pytest.approx(radius, rel=1e-3)
    assert found["jacobian"]["loops"] == [1, T, 2 * T, 8 * T]


@pytest.mark.parametrize("changes", [{}, {"injection": "post", "state_dtype": "bfloat16"}])
def test_the_norm_is_that_of_the_whole_jacobian(changes: dict[str, Any]) -> None:
    model, batch = _model(**changes), _batch(1, 4)
    e, context = stability.loop_input(model, batch)
    e = e.detach()
    h = torch.randn(e.shape, generator=torch.Generator().manual_seed(5))

    def step(x: torch.Tensor) -> torch.Tensor:
        return model.step_loop(x, e, loop=1, context=context)[0]

    with smooth(model):
        step(h)
        norm, _ = spectral_norm(step, h, iterations=30)
        whole = torch.autograd.functional.jacobian(step, h)
        assert isinstance(whole, torch.Tensor)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(whole.view(h.numel(), -1), 2)), rel=2e-3)


def test_smooth_pins_the_experts_and_lets_go() -> None:
    model = _model(state_dtype="bfloat16")
    router = model.moe_layers()[0].router
    low, high = torch.rand(2, 3, CONFIG.n_experts).sort(-1).values
    with smooth(model):
        first = router.choose(low, None)
        assert torch.equal(router.choose(-high, None), first)
        assert model.recurrent.state_dtype is torch.float32
    assert not torch.equal(router.choose(-high, None), first)
    assert model.recurrent.state_dtype is torch.bfloat16


def test_measure_agrees_with_the_records_of_a_forward_and_draws(tmp_path: Path) -> None:
    from mythos_ds.model.forward_stats import ForwardRecords

    model, batches = _model(), [_batch(), _batch(1, 6)]
    found = stability.measure(model, batches, iterations=3)
    assert found == json.loads(json.dumps(found))
    assert (found["tokens"], len(found["loops"])) == (18, 8 * T)
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    records = ForwardRecords(details=True)
    with torch.no_grad():
        model(batches[0]["tokens"], n_loops=8 * T, records=records)
    alone = stability.measure(model, batches[:1], iterations=1)
    expected = [float(records.loops[loop].state_rms) for loop in range(8 * T)]
    assert alone["state_rms"] == pytest.approx(expected, rel=1e-4)
    pytest.importorskip("matplotlib")
    stability.draw({"one": found, "two": alone}, tmp_path / "deep" / "s.png")
    assert (tmp_path / "deep" / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_too_few_loops_are_refused() -> None:
    with pytest.raises(LabError, match=f"nearest: {2 * T}"):
        stability.measure(_model(), [_batch()], loops=2 * T - 1)
