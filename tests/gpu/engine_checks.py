"""Call 1: the engine in one process, on NCCL where there is a GPU."""

import math
import tempfile
from pathlib import Path
from typing import Any

from mythos_ds.bench.acceptance import Probe
from mythos_ds.checkpoint.load import load_checkpoint
from mythos_ds.checkpoint.save import CheckpointWriter, TrainingState, layout_of
from mythos_ds.config.loader import list_presets
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.errors import NumericsError
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.trainer import with_depths
from tests.distributed.cases import GRAD_LOOPS, LOOPS, opened, own_batches
from tests.distributed.preset_cases import train_proxies
from tests.distributed.reshard_cases import compare, live_differences
from tests.gpu.model_checks import counted_syncs
from tests.gpu.staged_cases import primitives

STEPS, BEFORE = 4, 2
BATCH = 8
ACT = {"model": {"halting": "act"}, "training": {"ponder_cost": 0.01}}
VARIANTS: dict[str, dict[str, Any]] = {
    "ACT": ACT,
    "post injection": {"model": {"injection": "post", "lora_target": "output"}},
    "LoRA at the output": {"model": {"lora_target": "output"}},
    "tied embeddings": {"model": {"tie_embeddings": True}},
    "a depth for each sequence": {"per_sequence": True},
}


def collectives(probe: Probe) -> None:
    """Those of one rank on the real back end; all-to-all of no rows, integers and float64 too."""
    found = primitives()
    for name, difference in found["differences"].items():
        probe.number(name, difference, equals=0)


def presets(probe: Probe) -> None:
    """Every preset's proxy takes three steps in its own precision and ZeRO stage."""
    names = list_presets() if probe.on_gpu else ["1b"]
    for name, found in zip(names, train_proxies(names), strict=True):
        values = [*found["losses"], *found["norms"]]
        probe.number(f"{name}: values that are not finite", sum(not math.isfinite(value) for value in values), equals=0)
        probe.number(
            f"{name}: loss over that of guessing", found["losses"][0] / math.log(found["vocab_size"]), at_most=1.2
        )


def variants(probe: Probe) -> None:
    """Two steps of each part that presets leave out, in bf16."""
    for name, changes in VARIANTS.items():
        _two_steps(probe, name, changes)


def muon(probe: Probe) -> None:
    """Two steps of DeepSpeed's Muon, whose kernels are compiled."""
    _two_steps(probe, "Muon", {"training": {"optimizer": "muon", "muon_lr": 0.02, "grad_clip": 0.0}})


def _two_steps(probe: Probe, name: str, changes: dict[str, Any]) -> None:
    with opened({"ep": 1, "stage": 3, "dtype": "bfloat16", **changes}) as (engine, groups):
        found = []
        for step in range(2):
            batches = own_batches(step, 2, groups)
            if changes.get("per_sequence"):
                batches = with_depths(batches, (3, 1, 2, 2, 1, 1, 3, 2), groups.layout)
            found.append(engine.train_step(batches, n_loops=3, n_grad_loops=2, lr=3e-3))
    values = [value for result in found for value in (result.loss, result.grad_norm)]
    probe.number(f"{name}: values that are not finite", sum(not math.isfinite(value) for value in values), equals=0)
    probe.number(f"{name}: gradient norm", found[1].grad_norm, at_least=1e-4)


def checkpoints(probe: Probe) -> None:
    """Saved after two steps, merged, loaded: the weights bit for bit, and the steps that follow."""
    for stage, asynchronous in ((3, False), (3, True), (1, False)):
        name = f"ZeRO-{stage}{', beside training' if asynchronous else ''}"
        with tempfile.TemporaryDirectory() as folder:
            _checkpoint(probe, name, {"ep": 1, "stage": stage, "dtype": "bfloat16"}, asynchronous, Path(folder))


def _checkpoint(probe: Probe, name: str, case: dict[str, Any], asynchronous: bool, folder: Path) -> None:
    with opened(case) as (engine, groups):
        _steps(engine, groups, 0, BEFORE)
        differs, tag = _saved(engine, groups, folder / "first", asynchronous)
        went_on = _steps(engine, groups, BEFORE, STEPS)
    with opened(case) as (engine, groups):
        load_checkpoint(engine, groups, tag)
        _, again = _saved(engine, groups, folder / "second", False)
        resumed = _steps(engine, groups, BEFORE, STEPS)
    probe.number(f"{name}: merged tensors that differ from the engine's", len(differs), equals=0)
    probe.number(f"{name}: tensors that differ after loading", len(compare(tag, again)), equals=0)
    probe.number(f"{name}: first loss after loading, difference", abs(went_on[0] - resumed[0]), equals=0)
    # Kernels of a GPU may add in another order each time, which shows from the second step on.
    bar = 1e-3 if probe.on_gpu else 0.0
    probe.number(f"{name}: second loss after loading, difference", abs(went_on[1] - resumed[1]), at_most=bar)


def _saved(engine: TrainingEngine, groups: ParallelGroups, folder: Path, asynchronous: bool) -> tuple[list[str], Path]:
    """Tensors that the merged checkpoint does not hold as the engine does, and the checkpoint."""
    config = engine.resolved.config.model_dump(mode="json")
    state = TrainingState(BEFORE, BATCH * BEFORE, None, layout_of(engine.resolved), config)
    writer = CheckpointWriter(engine, groups, folder, CheckpointConfig(asynchronous=asynchronous))
    tag = writer.save(state)
    writer.finish()
    return live_differences(engine, groups, tag), tag


def _steps(engine: TrainingEngine, groups: ParallelGroups, start: int, end: int) -> list[float]:
    return [
        engine.train_step(own_batches(step, 2, groups), n_loops=LOOPS[step], n_grad_loops=GRAD_LOOPS, lr=3e-3).loss
        for step in range(start, end)
    ]


def numerics(probe: Probe) -> None:
    """Weights that exploded end the run with the error that says so."""
    with opened({"ep": 1, "stage": 3}) as (engine, groups):
        said: NumericsError | None = None
        batches = own_batches(0, 2, groups)
        try:
            for _ in range(3):
                engine.train_step(batches, n_loops=2, n_grad_loops=2, lr=1e30)
        except NumericsError as error:
            said = error
    probe.note("message", None if said is None else said.report())
    probe.number(
        "ended by the error of numbers that are not finite",
        said is not None and said.code in ("MDS801", "MDS802"),
        equals=1,
    )


def step_syncs(probe: Probe) -> None:
    """Waits of the host in one optimizer step of the engine."""
    with opened({"ep": 1, "stage": 3, "dtype": "bfloat16"}) as (engine, groups):
        batches = own_batches(0, 2, groups)
        for _ in range(2):
            engine.train_step(batches, n_loops=3, n_grad_loops=2, lr=1e-3, statistics=False)
        with counted_syncs() as waits:
            engine.train_step(batches, n_loops=3, n_grad_loops=2, lr=1e-3, statistics=False)
    probe.number("waits of the host in a step of two micro-batches of 3 documents", len(waits), at_most=60)
