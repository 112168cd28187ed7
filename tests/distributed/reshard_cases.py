"""What runs inside the processes of test_reshard.py."""

from pathlib import Path
from typing import Any

import torch

from mythos_ds.checkpoint.deepspeed_format import WEIGHTS
from mythos_ds.checkpoint.load import load_checkpoint
from mythos_ds.checkpoint.portable import open_state
from mythos_ds.checkpoint.save import CheckpointWriter, TrainingState, layout_of
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.parallel.groups import ParallelGroups
from tests.distributed.cases import (
    ACCUMULATION,
    GRAD_LOOPS,
    LEARNING_RATE,
    LOOPS,
    everywhere,
    full_weights,
    opened,
    own_batches,
)

BEFORE, AFTER = 3, 3


def work(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each task writes a checkpoint ("to") after some steps, or goes on from one ("from")."""
    return [_write(task) if "to" in task else _continue(task) for task in tasks]


def _write(task: dict[str, Any]) -> dict[str, Any]:
    """Train, save, compare what can be merged from the files with the engine's own tensors, train on."""
    with opened(task["case"]) as (engine, groups):
        _steps(engine, groups, task["case"], 0, BEFORE)
        tag = _save(engine, groups, Path(task["to"]))
        different = live_differences(engine, groups, tag)
        losses = _steps(engine, groups, task["case"], BEFORE, AFTER)
    return {"different": different, "losses": losses}


def live_differences(engine: TrainingEngine, groups: ParallelGroups, tag: Path) -> list[str]:
    """Tensors that a checkpoint, merged, does not hold bit for bit as the engine that wrote it; names that only one of
    them has."""
    weights = open_state(tag)[0][WEIGHTS]
    live = full_weights(engine, groups)
    buffers = everywhere({name: buffer.cpu().clone() for name, buffer in engine.module.named_buffers()})
    rounded = engine.resolved.config.training.dtype == "bfloat16"
    merged = {name: weights.read(name).bfloat16().float() if rounded else weights.read(name) for name in live}
    different = [name for name in live if not torch.equal(merged[name], live[name])]
    different += [name for name in buffers if not torch.equal(weights.read(name), buffers[name])]
    return different + sorted(set(weights.specs()) ^ (set(live) | set(buffers)))


def _continue(task: dict[str, Any]) -> dict[str, Any]:
    """Load another layout's checkpoint, save it at once, compare every element of both, train on."""
    source = Path(task["from"])
    with opened(task["case"]) as (engine, groups):
        load_checkpoint(engine, groups, source)
        tag = _save(engine, groups, Path(task["again"]))
        different = compare(source, tag)
        losses = _steps(engine, groups, task["case"], BEFORE, AFTER)
        counted = engine.deepspeed.global_steps
    return {"different": different, "losses": losses, "global_steps": counted}


def compare(first: Path, second: Path) -> list[str]:
    """Tensors of any kind that two checkpoints do not hold alike, bit for bit."""
    (one, updates), (two, other) = open_state(first), open_state(second)
    different = [] if (updates, set(one)) == (other, set(two)) else [f"{updates} {sorted(one)} {other} {sorted(two)}"]
    for kind in set(one) & set(two):
        names = set(one[kind].specs()) | set(two[kind].specs())
        for name in sorted(names):
            known = name in one[kind].specs() and name in two[kind].specs()
            if not known or not torch.equal(one[kind].read(name), two[kind].read(name)):
                different.append(f"{kind} {name}")
    return different


def _save(engine: TrainingEngine, groups: ParallelGroups, folder: Path) -> Path:
    config = engine.resolved.config.model_dump(mode="json")
    state = TrainingState(BEFORE, 8 * BEFORE, None, layout_of(engine.resolved), config)
    return CheckpointWriter(engine, groups, folder, CheckpointConfig(keep=9)).save(state)


def _steps(engine: TrainingEngine, groups: ParallelGroups, case: dict[str, Any], start: int, count: int) -> list[float]:
    lr = LEARNING_RATE.get(case.get("optimizer", "adamw"), 3e-3)
    results = [
        engine.train_step(
            own_batches(step, case.get("accumulation", ACCUMULATION), groups),
            n_loops=LOOPS[step % len(LOOPS)],
            n_grad_loops=GRAD_LOOPS,
            lr=lr,
        )
        for step in range(start, start + count)
    ]
    return [result.loss for result in results]
