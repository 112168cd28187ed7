"""What runs inside the processes of test_init_from.py."""

import threading
from pathlib import Path
from typing import Any

import torch

from mythos_ds.checkpoint.deepspeed_format import WEIGHTS
from mythos_ds.checkpoint.load import load_checkpoint
from mythos_ds.checkpoint.portable import open_state
from mythos_ds.checkpoint.reshard import load_weights
from mythos_ds.checkpoint.save import CheckpointWriter, TrainingState, layout_of
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.conversion.model_target import ROUTER_BUFFERS
from mythos_ds.conversion.starting_weights import open_starting_weights
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.errors import MythosError
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.weights.reader import TensorFolder
from tests.distributed.cases import ACCUMULATION, GRAD_LOOPS, LOOPS, everywhere, full_weights, opened, own_batches

STEPS, LR = 3, 3e-3


def work(tasks: list[dict[str, Any]]) -> list[Any]:
    """Each task's result."""
    return [globals()[f"_{task['what']}"](task) for task in tasks]


def _start(task: dict[str, Any]) -> dict[str, Any]:
    """The first step's loss, and the tensors that are not those of the folder."""
    with opened(task["case"]) as (engine, groups):
        _load(engine, groups)
        live = {**full_weights(engine, groups), **_buffers(engine)}
        folder = TensorFolder(Path(task["case"]["training"]["init_from"]))
        wanted = {name: folder.read(name) for name in folder.specs()}
        if task["case"].get("dtype") == "bfloat16":
            whole = {name: value for name, value in wanted.items() if name.endswith(ROUTER_BUFFERS)}
            wanted = {name: value.bfloat16().float() for name, value in wanted.items()} | whole
        names = set(live) ^ set(wanted)
        different = [name for name in set(live) & set(wanted) if not torch.equal(live[name].float(), wanted[name])]
        (loss,) = _steps(engine, groups, task["case"], 0, 1)
    return {"different": sorted(different) + sorted(names), "loss": loss}


def _frozen(task: dict[str, Any]) -> dict[str, Any]:
    """Which weights moved in three steps, what a checkpoint says of them, and the losses of going on."""
    with opened(task["case"]) as (engine, groups):
        if "from" in task:
            load_checkpoint(engine, groups, Path(task["from"]))
            return {"losses": _steps(engine, groups, task["case"], STEPS, STEPS)}
        _load(engine, groups)
        before = {name: value.clone() for name, value in full_weights(engine, groups).items()}
        _steps(engine, groups, task["case"], 0, STEPS)
        live = full_weights(engine, groups)
        config = engine.resolved.config.model_dump(mode="json")
        state = TrainingState(STEPS, 8 * STEPS, None, layout_of(engine.resolved), config)
        tag = CheckpointWriter(engine, groups, Path(task["to"]), CheckpointConfig(keep=9)).save(state)
        kinds, _ = open_state(tag)
        weights = kinds.pop(WEIGHTS)
        different = [name for name, value in live.items() if not torch.equal(_as(weights.read(name), task), value)]
        return {
            "moved": [name for name in live if not torch.equal(live[name], before[name])],
            "names": sorted(live),
            "different": different + sorted(set(weights.specs()) ^ {*live, *_buffers(engine)}),
            "with_state": sorted(kinds["exp_avg"].specs()) if "exp_avg" in kinds else [],
            "losses": _steps(engine, groups, task["case"], STEPS, STEPS),
        }


def _as(value: torch.Tensor, task: dict[str, Any]) -> torch.Tensor:
    return value.bfloat16().float() if task["case"].get("dtype") == "bfloat16" else value


def _moves(task: dict[str, Any]) -> dict[str, list[float]]:
    """How far one step moves every weight."""
    with opened(task["case"]) as (engine, groups):
        _load(engine, groups)
        before = {name: value.clone() for name, value in full_weights(engine, groups).items()}
        _steps(engine, groups, task["case"], 0, 1)
        after = full_weights(engine, groups)
        return {name: (after[name] - value).double().flatten().tolist() for name, value in before.items()}


def _memory(task: dict[str, Any]) -> float:
    """The most anonymous memory, in bytes, that this process held until the end of the first step."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
            peak[0] = max(peak[0], 1024 * int(line.split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with opened(task["case"]) as (engine, groups):
        _load(engine, groups)
        _steps(engine, groups, task["case"], 0, 1)
    ended.set()
    watcher.join()
    return float(peak[0])


def _refused(task: dict[str, Any]) -> str:
    """The message of a start that is refused."""
    try:
        with opened(task["case"]) as (engine, groups):
            _load(engine, groups)
    except MythosError as error:
        return str(error)
    return ""


def _load(engine: TrainingEngine, groups: ParallelGroups) -> None:
    if engine.resolved.config.training.init_from is not None:
        weights = open_starting_weights(engine.resolved, groups.rank)
        load_weights(engine, groups, weights.source, str(weights.identity["name"]))


def _buffers(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    return everywhere({name: buffer.clone() for name, buffer in engine.module.named_buffers()})


def _steps(engine: TrainingEngine, groups: ParallelGroups, case: dict[str, Any], start: int, count: int) -> list[float]:
    return [
        engine.train_step(
            own_batches(step, case.get("accumulation", ACCUMULATION), groups),
            n_loops=LOOPS[step % len(LOOPS)],
            n_grad_loops=GRAD_LOOPS,
            lr=LR,
        ).loss
        for step in range(start, start + count)
    ]
