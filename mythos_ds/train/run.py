"""One training run in one process of many: groups, checkpoint, data, engine, training, report."""

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from mythos_ds import log
from mythos_ds.checkpoint import manifest as files
from mythos_ds.checkpoint.load import load_checkpoint
from mythos_ds.checkpoint.reshard import load_weights
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.start import require_room
from mythos_ds.engine.build import Adapt, build_engine
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import CheckpointError, ConfigError, MythosError
from mythos_ds.guard import files_of_the_group
from mythos_ds.hardware import host_memory_bytes
from mythos_ds.parallel.collective import on_rank_zero, together
from mythos_ds.parallel.groups import ParallelGroups, init_parallel
from mythos_ds.resilience.failure import abort
from mythos_ds.resilience.signals import StopSignals
from mythos_ds.train.callbacks import Callback
from mythos_ds.train.data_loader import DataLoader, TextLoader
from mythos_ds.train.resume import choose_checkpoint, manifest_for
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import RunManifest, new_manifest, with_dataset, with_weights
from mythos_ds.train.summary import RunSummary, show_summary
from mythos_ds.train.trainer import Progress, Trainer
from mythos_ds.weights.model_folder import CONFIG
from mythos_ds.weights.reader import StartingWeights

_logger = log.get_logger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """What a command line asks for. `resume`: "auto", "never" or a path; `source_text`: the file as it was read;
    `allow_pickle`: execute what a checkpoint's files contain; `share`: files for all whom the umask lets read them, not
    for the owner's group at most."""

    resolved: ResolvedRun
    source_text: str
    run_dir: Path
    resume: str
    argv: tuple[str, ...]
    allow_pickle: bool = False
    share: bool = False


OpenWeights = Callable[[ResolvedRun, int], StartingWeights]
"""Opens the weights that `training.init_from` names, on the rank that is given."""
OpenData = Callable[[ResolvedRun, RunManifest, ParallelGroups, int], DataLoader]
"""Opens a run's data from a step on; the calling process's part of them."""


def train(
    request: RunRequest,
    environment: ProcessEnvironment,
    *,
    open_data: OpenData = TextLoader.open,
    open_weights: OpenWeights | None = None,
    adapt: Adapt | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunSummary:
    """Start or resume the run and train it to its end. Raises MythosError subclasses for what a user can mend.

    open_data: other data than the configured ones; open_weights: needed with `training.init_from`, and called for a
    fresh start only; adapt: changes the model right after it was made; callbacks: see
    `callbacks.py`.
    """
    log.configure(environment.rank)
    # DeepSpeed calls collectives by names that newer torch versions announce to rename: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    resolved = request.resolved
    # Before the signals: a process that waits for others in here is ended by SIGTERM, not asked to stop after a step.
    groups = init_parallel(environment, resolved.ep_size, resolved.stages, timeout_s=resolved.config.parallel.timeout_s)
    with StopSignals() as stop, files_of_the_group(everyone=request.share):
        try:
            together(groups, lambda: _require_room(resolved, environment, groups))
            summary = _train(request, groups, stop, open_data, open_weights, adapt, callbacks)
        except MythosError:
            groups.close()
            raise
        except Exception as error:
            abort(error, groups.rank, request.run_dir)
        groups.close()
        return summary


def _train(
    request: RunRequest,
    groups: ParallelGroups,
    stop: StopSignals,
    open_data: OpenData,
    open_weights: OpenWeights | None,
    adapt: Adapt | None,
    callbacks: Sequence[Callback],
) -> RunSummary:
    resolved, run = request.resolved, RunDirectory(request.run_dir)
    claimed = together(groups, lambda: run.lock() if groups.rank == 0 else None)
    tag = choose_checkpoint(groups, run, request.resume)
    manifest = together(groups, lambda: manifest_for(run, tag, new_manifest(resolved)))
    step = 0 if tag is None else files.tag_step(tag)
    weights = _starting_weights(resolved, groups, open_weights) if tag is None else None
    if weights is not None:
        manifest = with_weights(manifest, weights.identity)
    data = open_data(resolved, manifest, groups, step)
    manifest = together(groups, lambda: with_dataset(manifest, data.identity))
    on_rank_zero(groups, lambda: _record(request, run, manifest, step))
    engine = build_engine(resolved, groups, adapt)
    progress = Progress()
    if weights is not None:
        _start_from(weights, engine, groups)
    if tag is not None:
        state = load_checkpoint(engine, groups, tag, allow_pickle=request.allow_pickle)
        progress = Progress(state.step, state.first_validation_loss)
    summary = Trainer(resolved, groups, engine, data, run, manifest, progress, callbacks).train(stop)
    if groups.rank == 0:
        show_summary(Console(), summary, run, resolved.config.model.mean_recurrence)
    if claimed is not None:
        claimed.close()
    return summary


def _require_room(resolved: ResolvedRun, environment: ProcessEnvironment, groups: ParallelGroups) -> None:
    on_cpu = groups.device.type == "cpu"
    require_room(resolved, host_memory_bytes(), environment.local_world_size, on_cpu=on_cpu)


def _starting_weights(
    resolved: ResolvedRun, groups: ParallelGroups, open_weights: OpenWeights | None
) -> StartingWeights | None:
    """What `training.init_from` names, on every rank the same: of a run that may still be training rank 0 takes the
    newest whole checkpoint, for all."""
    source = resolved.config.training.init_from
    if source is None:
        return None
    chosen = groups.from_rank_zero(together(groups, lambda: _newest(Path(source)) if groups.rank == 0 else ""))
    training = resolved.config.training.model_copy(update={"init_from": chosen})
    settled = replace(resolved, config=resolved.config.model_copy(update={"training": training}))
    weights = together(groups, lambda: _opened(settled, groups.rank, open_weights))
    name = Path(source).resolve().name  # as the manifest has it
    return None if weights is None else replace(weights, identity={**weights.identity, "name": name})


def _newest(source: Path) -> str:
    """The newest whole checkpoint where `source` is a run or its folder of checkpoints, else `source`."""
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    for tag in [] if (source / CONFIG).exists() else files.list_tags(folder):
        with contextlib.suppress(CheckpointError):
            files.verify(tag, 0, 1)
            return str(tag)
    return str(source)


def _opened(resolved: ResolvedRun, rank: int, open_weights: OpenWeights | None) -> StartingWeights | None:
    if resolved.config.training.init_from is None:
        return None
    if open_weights is None:
        raise ConfigError("training.init_from: given to a program that starts from random weights only; remove it")
    return open_weights(resolved, rank)


def _start_from(weights: StartingWeights, engine: TrainingEngine, groups: ParallelGroups) -> None:
    name = str(weights.identity["name"])
    for note in weights.notes if groups.rank == 0 else ():
        _logger.info("%s: %s", name, note)
    started = time.monotonic()
    together(groups, lambda: load_weights(engine, groups, weights.source, name))
    if groups.rank == 0:
        _logger.info("starting from the weights of %s, read in %.1f s", name, time.monotonic() - started)


def _record(request: RunRequest, run: RunDirectory, manifest: RunManifest, step: int) -> None:
    run.write_manifest(manifest)
    run.record_start(request.resolved, request.source_text, step, request.argv)
