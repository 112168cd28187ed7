"""What is read after every loop is what a forward of so many loops says, and thresholds on it choose the loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.inference.exit_rules import agreement, exit_loops, loop_steps, scores, trace_loops
from mythos_ds.model.mythos import MythosModel
from tests.helpers.toy_model import MLA, randomise, toy_batch, toy_config

LOOPS = 5
VARIANTS: list[dict[str, Any]] = [
    {},
    MLA,
    {"injection": "post", "initial_state": "embedding"},
    {"state_dtype": "bfloat16", "coda_layers": 0, "tie_embeddings": True},
    {"halting": "gate"},
]


def made(changes: dict[str, Any]) -> tuple[MythosModel, dict[str, Tensor]]:
    config = toy_config(**changes)
    return randomise(MythosModel(config)).eval(), toy_batch(config)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_loop_is_a_forward_of_so_many_loops(changes: dict[str, Any]) -> None:
    model, batch = made(changes)
    trace = trace_loops(model, batch["tokens"], LOOPS, batch["positions"], batch["targets"])
    assert trace.loss is not None
    before = torch.empty(0)
    for loop, step in enumerate(loop_steps(model, batch["tokens"], LOOPS, batch["positions"])):
        with torch.no_grad():
            logits = model(batch["tokens"], n_loops=loop + 1, positions=batch["positions"])
            loss = model(**batch, n_loops=loop + 1)
        assert torch.equal(step.logits, logits)
        assert trace.loss[loop].mean().item() == pytest.approx(loss.item(), rel=1e-5)
        assert torch.equal(trace.argmax[loop], logits.argmax(-1))
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        assert torch.allclose(trace.entropy[loop], entropy, atol=1e-5)
        ratio = (step.after - step.before).norm(dim=-1) / step.after.norm(dim=-1)
        assert torch.allclose(trace.latent_difference[loop], ratio)
        if loop:
            kl = torch.nn.functional.kl_div(before.log_softmax(-1), logits.log_softmax(-1), reduction="none",
                                            log_target=True).sum(-1)  # fmt: skip
            assert torch.allclose(trace.kl[loop], kl, atol=1e-5)
        before = logits
    assert trace.kl[0].isinf().all()
    assert (trace.gate is not None) == ("gate" in scores(trace)) == (changes.get("halting") == "gate")
    assert not trace.entropy.requires_grad


def test_a_gate_changes_no_forward() -> None:
    plain, batch = made({})
    gated = MythosModel(toy_config(halting="gate"))
    gated.load_state_dict(plain.state_dict(), strict=False)
    losses = [model(**batch, n_loops=LOOPS) for model in (plain, gated)]
    losses[1].backward()
    assert torch.equal(losses[0], losses[1])
    assert all(parameter.grad is None for parameter in gated.recurrent.gate.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(("changes", "n_loops"), [({"halting": "act"}, 2), ({}, 0)])
def test_what_has_no_trace_is_refused(changes: dict[str, Any], n_loops: int) -> None:
    model, batch = made(changes)
    with pytest.raises(ValueError, match="n_loops"):
        trace_loops(model, batch["tokens"], n_loops)


def test_a_position_leaves_after_the_first_score_below_the_threshold() -> None:
    score = torch.tensor([[3.0, 0.1, torch.inf, 2.0], [1.0, 5.0, 0.0, 2.0], [0.0, 0.0, 0.0, 2.0]])[:, None]
    assert exit_loops(score, 1.0).tolist() == [[3, 1, 2, 3]], "not below it is not an exit; the last loop always is"
    assert exit_loops(score, 1.1).tolist() == [[2, 1, 2, 3]]
    assert exit_loops(score, torch.inf).tolist() == [[1, 1, 2, 1]], "an infinite score never is below"
    assert exit_loops(score, -1.0).tolist() == [[3, 3, 3, 3]]


def test_agreement_counts_unchanged_loops() -> None:
    argmax = torch.tensor([[7, 1], [7, 2], [7, 2], [3, 2], [3, 5]])[:, None]
    score = agreement(argmax)
    assert score[:, 0].tolist() == [[0, 0], [-1, 0], [-2, -1], [0, -2], [-1, 0]]
    assert exit_loops(score, 0.5 - 2).tolist() == [[3, 4]], "unchanged for two loops"
