"""A recompute uses the experts that its forward chose, whatever has become of the scores."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from mythos_ds.config.layout import whole_model
from mythos_ds.config.schema import ActivationCheckpointing
from mythos_ds.model import routing_replay
from mythos_ds.model.context import AuxLoss, ForwardContext
from mythos_ds.model.dispatch import LocalDispatcher
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.loop_index import LoopIndex
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.pipeline_stage import MicroBatch, StageModel, StageState, Visit
from mythos_ds.model.router import Router
from tests.helpers.perturbed_recompute import Choices, perturbed_recompute
from tests.helpers.toy_model import gradient, randomise, toy_batch, toy_config

AUX = AuxLoss(balance=0.3, z=0.02, ponder=0.1)
LOOPS, GRAD_LOOPS = 4, 2
VARIANTS: list[dict[str, Any]] = [
    {},
    {"halting": "act", "act_threshold": 0.8},
    {"n_expert_groups": 4, "n_limited_groups": 2},
]


def run_model(
    seed: int, noise: float, unit: ActivationCheckpointing = "loop", **changes: Any
) -> tuple[MythosModel, Choices]:
    """Forward and backward of a drawn model and batch."""
    config = toy_config(**changes)
    model = randomise(MythosModel(config, activation_checkpointing=unit), seed)
    with perturbed_recompute(model, noise, seed) as choices:
        batch = toy_batch(config, seed=seed)
        model(**batch, n_loops=LOOPS, n_grad_loops=GRAD_LOOPS, aux=AUX, records=ForwardRecords(details=True)).backward()
    return model, choices


def run_visits(seed: int, noise: float, unit: ActivationCheckpointing = "loop") -> Choices:
    """The same through the visits of a ring of one stage."""
    config = toy_config()
    model = randomise(StageModel(config, activation_checkpointing=unit, part=whole_model(config)), seed)
    batch = toy_batch(config, seed=seed)
    context = model.make_context(batch["tokens"], batch["positions"], AUX, GRAD_LOOPS)
    micro_batch = MicroBatch(batch["tokens"], batch["targets"], context)
    message: Tensor | None = None
    state: StageState = ()
    with perturbed_recompute(model, noise, seed) as choices:
        loops = [Visit("loop", LOOPS, GRAD_LOOPS, loop) for loop in range(LOOPS)]
        for visit in (Visit("prelude", LOOPS, GRAD_LOOPS), *loops, Visit("coda", LOOPS, GRAD_LOOPS)):
            message, state = model(visit, message, state, micro_batch)
        context.records.close()
        assert message is not None
        message.backward()
    return choices


def without_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets recomputes choose anew."""
    monkeypatch.setattr(ForwardContext, "for_recompute", lambda self, last: self)


@pytest.mark.parametrize("unit", ["layer", "loop"])
@pytest.mark.parametrize("seed", range(50))
def test_a_perturbed_recompute_keeps_the_choices(seed: int, unit: ActivationCheckpointing) -> None:
    model, choices = run_model(seed, 1.0, unit, **VARIANTS[seed % len(VARIANTS)])
    assert sorted(choices.recompute) == [(layer, loop) for layer in range(2) for loop in (2, 3)]
    assert choices.changed() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("unit", ["layer", "loop"])
@pytest.mark.parametrize("seed", range(5))
def test_so_does_one_of_a_pipeline_stage(seed: int, unit: ActivationCheckpointing) -> None:
    choices = run_visits(seed, 1.0, unit)
    assert sorted(choices.recompute) == [(layer, loop) for layer in range(2) for loop in (2, 3)]
    assert choices.changed() == 0


@pytest.mark.parametrize("unit", ["layer", "loop"])
def test_otherwise_the_choices_change(monkeypatch: pytest.MonkeyPatch, unit: ActivationCheckpointing) -> None:
    """What the tests above would show if nothing were replayed: torch refuses the recompute, or takes it as it is."""
    without_replay(monkeypatch)
    refused, changed = 0, 0
    for seed in range(5):
        for run in (run_model, run_visits):
            try:
                outcome = run(seed, 1.0, unit)
            except CheckpointError:
                refused += 1
            else:
                changed += (outcome if isinstance(outcome, Choices) else outcome[1]).changed() > 0
    assert refused + changed == 10


@pytest.mark.parametrize("unit", ["layer", "loop"])
def test_a_faithful_recompute_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, unit: ActivationCheckpointing
) -> None:
    """With and without the replay, bit for bit."""
    kept = run_model(0, 0.0, unit)[0]
    plain = run_model(0, 0.0, "none")[0]
    without_replay(monkeypatch)
    anew = run_model(0, 0.0, unit)[0]
    for name, parameter in kept.named_parameters():
        for other in (plain, anew):
            assert torch.equal(gradient(parameter), gradient(other.get_parameter(name))), name


def test_gradients_flow_through_the_weights_of_kept_choices() -> None:
    """The weights are the normalised scores of the experts that are given, not of the best ones."""
    config = toy_config(route_scale=2.5)
    router = Router(config, Initializer(2))
    x = torch.randn(12, config.dim)
    indices = torch.randint(0, 4, (12, 1)) + torch.tensor([[0, 4]])
    got = router(x, LoopIndex(0), indices)
    scores = (x @ router.weight.t()).sigmoid().gather(1, indices)
    want = 2.5 * scores / scores.sum(1, keepdim=True)
    assert got.indices is indices
    assert not torch.equal(indices, router(x, LoopIndex(0)).indices)
    assert torch.allclose(got.weights, want, rtol=1e-6)
    upstream = torch.randn_like(want)
    got_gradient, want_gradient = (torch.autograd.grad(w, router.weight, upstream)[0] for w in (got.weights, want))
    assert torch.allclose(got_gradient, want_gradient, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unit", ["none", "layer", "loop"])
def test_only_what_is_recomputed_is_kept(training: bool, unit: ActivationCheckpointing) -> None:
    config = toy_config()
    model = MythosModel(config, activation_checkpointing=unit)
    with perturbed_recompute(model, 0.0, 0) as choices, torch.set_grad_enabled(training):
        model(**toy_batch(config), n_loops=LOOPS, n_grad_loops=GRAD_LOOPS)
    assert choices.loops_kept == ([2, 2, 3, 3] if training and unit != "none" else [])


@pytest.mark.parametrize("unit", ["layer", "loop"])
def test_what_is_kept_goes_with_the_graph(monkeypatch: pytest.MonkeyPatch, unit: ActivationCheckpointing) -> None:
    """And is small: three integers per token and chosen expert, and one per expert, for each layer and loop."""
    made: list[weakref.ref[Any]] = []
    sizes: list[int] = []
    decide = LocalDispatcher.decide

    def noting(self: LocalDispatcher, indices: Tensor, n_experts: int) -> routing_replay.RoutingDecision:
        decision = decide(self, indices, n_experts)
        kept = [*vars(decision).values(), *vars(decision.route).values()]
        tensors = [value for value in kept if isinstance(value, Tensor)]
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        made.append(weakref.ref(tensors[0]))
        return decision

    monkeypatch.setattr(LocalDispatcher, "decide", noting)
    config = toy_config()
    model = MythosModel(config, activation_checkpointing=unit)
    batch = toy_batch(config)
    loss = model(**batch, n_loops=LOOPS, n_grad_loops=GRAD_LOOPS)
    gc.collect()
    alive = [reference() is not None for reference in made]
    assert alive == [False] * 4 + [True] * 4
    per_call = 8 * (3 * batch["tokens"].numel() * config.n_experts_per_tok + config.n_experts)
    assert sizes == [per_call] * 8
    loss.backward()
    del loss
    gc.collect()
    assert not any(reference() is not None for reference in made)
    assert len(made) == 8, "the recompute decided nothing"
