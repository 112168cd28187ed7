"""What runs inside the processes of test_changed_states.py: a checkpoint goes on under settings that DeepSpeed's files
depend on, against plain torch that starts from the tensors in the files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.checkpoint.deepspeed_format import WEIGHTS
from mythos_ds.checkpoint.load import load_checkpoint
from mythos_ds.checkpoint.portable import open_state
from mythos_ds.checkpoint.save import CheckpointWriter, TrainingState, layout_of
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.engine.training_engine import StepResult, TrainingEngine
from mythos_ds.model.parameter_roles import is_frozen
from mythos_ds.parallel.groups import ParallelGroups
from tests.distributed.cases import (
    ACCUMULATION,
    GRAD_LOOPS,
    LEARNING_RATE,
    LOOPS,
    everywhere,
    full_weights,
    global_batches,
    largest,
    move_router_biases,
    opened,
    own_batches,
    reference_trainer,
)
from tests.helpers.reference import ReferenceTrainer

BEFORE, AFTER = 3, 3


def work(pairs: list[list[dict[str, Any]]], folder: str) -> list[dict[str, Any]]:
    """Each pair: the case that writes a checkpoint, and the one that goes on from it."""
    return [_pair(before, after, Path(folder) / str(number)) for number, (before, after) in enumerate(pairs)]


def _pair(before: dict[str, Any], after: dict[str, Any], folder: Path) -> dict[str, Any]:
    with opened(before) as (engine, groups):
        _steps(engine, groups, 0, BEFORE)
        tag = _save(engine, groups, folder / "before")
    with opened(after) as (engine, groups):
        load_checkpoint(engine, groups, tag)
        again = _save(engine, groups, folder / "again")
        different = _compare(tag, again, engine.resolved.config.training.frozen)
        results = _steps(engine, groups, BEFORE, AFTER)
        weights = full_weights(engine, groups)
        buffers = everywhere({name: buffer.clone() for name, buffer in engine.module.named_buffers()})
        found = _reference(tag, engine, results, weights, buffers)
    return {**found, "different": different}


def _compare(tag: Path, again: Path, frozen: list[str]) -> list[str]:
    """Weights and moments that did not come over bit for bit; new moments that are not zero."""
    (one, updates), (two, other) = open_state(tag), open_state(again)
    different = [] if updates == other else [f"updates {updates} {other}"]
    for kind, tensors in two.items():
        for name in tensors.specs():
            value = tensors.read(name)
            if name in one[kind].specs():
                expected = one[kind].read(name)
                rows = min(len(value), len(expected))
                same = torch.equal(value[:rows], expected[:rows]) and not value[rows:].any()
            else:
                same = not value.any()
            if not same or (kind != WEIGHTS and is_frozen(name, frozen)):
                different.append(f"{kind} {name}")
    return different


def _reference(
    tag: Path,
    engine: TrainingEngine,
    results: list[StepResult],
    weights: dict[str, Tensor],
    buffers: dict[str, Tensor],
) -> dict[str, Any]:
    config, training = engine.resolved.config.model, engine.resolved.config.training
    (states, updates), names = open_state(tag), set(weights)
    source = states.pop(WEIGHTS)
    biases = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
    for name, bias in biases.items():
        value = source.read(name)[: len(bias)]
        bias[: len(value)] = value
    trainer = reference_trainer({name: source.read(name) for name in sorted(names)}, biases, config, training)
    own = torch.optim.AdamW
    assert isinstance(trainer._optimizer, own)
    for name, value in trainer.params.items():
        if is_frozen(name, training.frozen):
            value.requires_grad_(False)
            continue
        moments = {
            kind: states[kind].read(name) if name in states[kind].specs() else torch.zeros_like(value)
            for kind in ("exp_avg", "exp_avg_sq")
        }
        trainer._optimizer.state[value] = {"step": torch.tensor(updates), **moments}
    expected = [
        _step(trainer, biases, step, engine.resolved.router_bias_rate) for step in range(BEFORE, BEFORE + AFTER)
    ]
    return {
        "loss": largest(abs(r.loss / loss - 1) for r, (loss, _) in zip(results, expected, strict=True)),
        "norm": largest(abs(r.grad_norm / norm - 1) for r, (_, norm) in zip(results, expected, strict=True)),
        "weight": largest(
            (weights[name] - value.detach()).abs().max().item() for name, value in trainer.params.items()
        ),
        "buffer": largest((buffers[name] - value).abs().max().item() for name, value in biases.items()),
        "moved": largest((weights[name] - source.read(name)).abs().max().item() for name in names),
    }


def _step(trainer: ReferenceTrainer, biases: dict[str, Tensor], step: int, rate: float) -> tuple[float, float]:
    loops = LOOPS[step % len(LOOPS)]
    found = trainer.step(global_batches(step, ACCUMULATION), loops, GRAD_LOOPS, LEARNING_RATE["adamw"])
    move_router_biases(biases, trainer.counts, rate)
    return found


def _save(engine: TrainingEngine, groups: ParallelGroups, folder: Path) -> Path:
    config = engine.resolved.config.model_dump(mode="json")
    state = TrainingState(BEFORE, 8 * BEFORE, None, layout_of(engine.resolved), config)
    return CheckpointWriter(engine, groups, folder, CheckpointConfig(keep=9)).save(state)


def _steps(engine: TrainingEngine, groups: ParallelGroups, start: int, count: int) -> list[StepResult]:
    return [
        engine.train_step(
            own_batches(step, ACCUMULATION, groups),
            n_loops=LOOPS[step % len(LOOPS)],
            n_grad_loops=GRAD_LOOPS,
            lr=LEARNING_RATE["adamw"],
        )
        for step in range(start, start + count)
    ]
