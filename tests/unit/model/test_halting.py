"""Adaptive halting freezes a position, state included, and ends in a weighted mean of its states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.model.halting import Halting, HaltingState
from mythos_ds.model.mythos import MythosModel
from tests.helpers.toy_model import MLA, randomise, toy_batch, toy_config

LOOPS = 6


def trace(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> tuple[MythosModel, list[HaltingState], list[Tensor]]:
    """A model after one forward, with the halting state and the block's state h after each loop."""
    halting_states: list[HaltingState] = []
    states: list[Tensor] = []
    step = Halting.step

    def noting(self: Halting, state: HaltingState, h: Tensor, *rest: Any) -> HaltingState:
        new = step(self, state, h, *rest)
        halting_states.append(new)
        states.append(h)
        return new

    monkeypatch.setattr(Halting, "step", noting)
    config = toy_config(halting="act", act_threshold=0.8, **changes)
    model = randomise(MythosModel(config))
    batch = toy_batch(config)
    with torch.no_grad():
        model(batch["tokens"], n_loops=LOOPS, positions=batch["positions"])
    return model, halting_states, states


@pytest.mark.parametrize("changes", [{}, MLA, {"injection": "post"}], ids=["gqa", "mla", "post"])
def test_a_halted_position_keeps_its_state_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    _, halting_states, states = trace(monkeypatch, changes)
    shares = []
    for loop in range(1, LOOPS):
        halted = halting_states[loop - 1].halted
        shares.append(halted.float().mean().item())
        assert torch.equal(states[loop][halted], states[loop - 1][halted])
        assert (states[loop][~halted] != states[loop - 1][~halted]).any(-1).all(), "running positions move"
        assert set(halting_states[loop].entries) == {(loop, 0), (loop, 1)}
        for layer in range(2):
            new, old = (vars(halting_states[at].entries[at, layer]) for at in (loop, loop - 1))
            assert len(new) == 2
            assert all(torch.equal(new[name][halted], old[name][halted]) for name in new)
            assert not any(torch.equal(new[name][~halted], old[name][~halted]) for name in new)
    assert any(0 < share < 1 for share in shares), "some positions halt, some do not"


def test_the_output_is_a_weighted_mean_and_the_ponder_cost_counts_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, halting_states, states = trace(monkeypatch, {})
    halting = model.recurrent.halting
    assert halting is not None
    last = halting_states[-1]
    assert last.halted.all()
    with torch.no_grad():
        probability = [halting(h) for h in states]
    for index in [(b, s) for b in range(3) for s in range(20)]:
        spent, output, cost = 0.0, torch.zeros(model.config.dim), 0.0
        for loop, (h, p) in enumerate(zip(states, probability, strict=True)):
            ends = spent + p[index].item() >= 0.8 or loop == LOOPS - 1
            weight = 1 - spent if ends else p[index].item()
            output, spent = output + weight * h[index], spent + weight
            cost += 1 + weight * ends
            if ends:
                break
        assert spent == pytest.approx(1.0)
        assert torch.allclose(last.output[index], output, atol=1e-5)
        assert last.ponder[index].item() == pytest.approx(cost, rel=1e-5)
