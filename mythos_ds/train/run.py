"""One training run in one process of many: groups, checkpoint, data, engine, training, report."""

import functools
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mythos_ds import log
from mythos_ds.checkpoint import manifest as files
from mythos_ds.checkpoint.load import load_checkpoint, newest_whole
from mythos_ds.checkpoint.reshard import load_weights
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.config.resolve import ResolvedRun, ResolvedStage
from mythos_ds.costs.start import require_room
from mythos_ds.data.datasets import check_sources
from mythos_ds.engine.build import Adapt, build_engine, check_frozen
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ConfigError, DataError, MythosError
from mythos_ds.guard import files_of_the_group
from mythos_ds.hardware import host_memory_bytes
from mythos_ds.monitor.weights_and_biases import require_wandb
from mythos_ds.parallel.collective import on_rank_zero, together
from mythos_ds.parallel.groups import ParallelGroups, init_parallel
from mythos_ds.resilience.failure import abort
from mythos_ds.resilience.signals import StopSignals
from mythos_ds.train.callbacks import Callback
from mythos_ds.train.data_loader import DataLoader, TextLoader
from mythos_ds.train.metrics_logger import validation_history
from mythos_ds.train.resume import choose_checkpoint, names_of, where_to_start
from mythos_ds.train.run_changes import RunNames, StageEnd, begin_stage, trained_on_before, with_dataset
from mythos_ds.train.run_directory import RunDirectory, copy_metrics
from mythos_ds.train.run_manifest import RunManifest, planned_stages, with_weights
from mythos_ds.train.summary import RunSummary, show_summary
from mythos_ds.train.trainer import Progress, Trainer
from mythos_ds.weights.model_folder import CONFIG
from mythos_ds.weights.reader import StartingWeights

_logger = log.get_logger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """What a command line asks for. `stages`: the training stages, in order; `source_text`: the file as it was read, of
    the name `config_file`; `resume`: "auto", "never" or a path; `allow_pickle`: execute what a checkpoint's files
    contain; `share`: files for all whom the umask lets read them, not for the owner's group at most; `new_stage`: the
    name of the first of `stages`, where it begins at the checkpoint that `resume` names."""

    stages: tuple[ResolvedStage, ...]
    source_text: str
    run_dir: Path
    resume: str
    argv: tuple[str, ...]
    allow_pickle: bool = False
    share: bool = False
    new_stage: str | None = None
    config_file: str = "this configuration"

    @classmethod
    def of(cls, resolved: ResolvedRun, source_text: str, run_dir: Path) -> "RunRequest":
        """A run of one training stage, which resumes by itself."""
        return cls((ResolvedStage(None, resolved),), source_text, run_dir, "auto", ())


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
    resolved = request.stages[0].run
    # Before the signals: a process that waits for others in here is ended by SIGTERM, not asked to stop after a step.
    groups = init_parallel(
        environment,
        resolved.ep_size,
        resolved.stages,
        tied=resolved.config.model.tie_embeddings,
        dispatch=resolved.config.parallel.dispatch,
        rows_in_fp8=resolved.config.parallel.dispatch_dtype == "fp8",
        timeout_s=resolved.config.parallel.timeout_s,
    )
    run = RunDirectory(request.run_dir)
    with StopSignals() as stop, files_of_the_group(everyone=request.share):
        try:
            together(groups, lambda: _require_room(request.stages, environment, groups))
            summary = _train(request, run, groups, stop, open_data, open_weights, adapt, callbacks)
        except MythosError:
            run.remove_unused()
            groups.close()
            raise
        except Exception as error:
            abort(error, groups.rank, request.run_dir)
        groups.close()
        return summary


def _train(
    request: RunRequest,
    run: RunDirectory,
    groups: ParallelGroups,
    stop: StopSignals,
    open_data: OpenData,
    open_weights: OpenWeights | None,
    adapt: Adapt | None,
    callbacks: Sequence[Callback],
) -> RunSummary:
    """One training stage after the other, each with an engine of its own; all but the first load the checkpoint that
    the one before left, whether they follow it in this process or not."""
    stages = request.stages
    claimed = together(groups, lambda: run.lock() if groups.rank == 0 else None)
    tag = choose_checkpoint(groups, run, request.resume, request.new_stage)
    names = names_of(tag, request.config_file, request.argv)
    start = together(groups, lambda: where_to_start(tag, stages, names, request.new_stage))
    if tag is not None and stages[0].name is not None:
        on_rank_zero(groups, functools.partial(_take_metrics, run, tag))
    index, manifest, ended = start.index, start.manifest, start.ended
    for stage in stages[index:]:
        on_rank_zero(groups, functools.partial(require_wandb, stage.run.config.monitor.wandb))
    _check_ahead(stages[index + 1 :], groups)
    starts = True
    while True:
        if ended and tag is not None:
            index, ended = index + 1, False
            manifest = _begun(groups, run, tag, manifest, request, index, names)
        part = _StageRun(request, stages[index], manifest, tag, names, starts)
        summary, manifest = _train_stage(part, groups, run, stop, open_data, open_weights, adapt, callbacks)
        _free_memory(groups)
        more = summary.finished and index + 1 < len(stages)
        if groups.rank == 0:
            show_summary(Console(), summary, run, stages[index].run.config.model.mean_recurrence, stages[index].name)
        if not more or groups.any(stop.requested):
            break
        if tag is None or files.tag_step(tag) < summary.step:
            tag = run.checkpoints / files.tag_name(summary.step)
        ended, starts = True, False
        names = names_of(tag, request.config_file, request.argv)
    if claimed is not None:
        claimed.close()
    return replace(summary, finished=summary.finished and not more)


@dataclass(frozen=True)
class _StageRun:
    """What a training stage is in this start."""

    request: RunRequest
    stage: ResolvedStage
    manifest: RunManifest
    tag: Path | None
    names: RunNames
    starts: bool
    """Whether this start begins with it."""


def _train_stage(
    part: _StageRun,
    groups: ParallelGroups,
    run: RunDirectory,
    stop: StopSignals,
    open_data: OpenData,
    open_weights: OpenWeights | None,
    adapt: Adapt | None,
    callbacks: Sequence[Callback],
) -> tuple[RunSummary, RunManifest]:
    """Train a stage from its checkpoint, or afresh, to its end; the manifest with what was opened."""
    request, resolved, manifest, tag = part.request, part.stage.run, part.manifest, part.tag
    step = 0 if tag is None else files.tag_step(tag)
    weights = _starting_weights(resolved, groups, open_weights) if tag is None else None
    if weights is not None:
        manifest = with_weights(manifest, weights.identity)
    data = open_data(resolved, manifest, groups, step)
    manifest = together(groups, lambda: with_dataset(manifest, data.identity, resolved.config, part.names))
    for note in trained_on_before(manifest) if groups.rank == 0 else ():
        _logger.warning("%s", note)
    on_rank_zero(groups, lambda: _record(part, run, manifest, step, groups.world_size))
    engine = build_engine(resolved, groups, adapt)
    progress = Progress()
    if weights is not None:
        _start_from(weights, engine, groups)
    if tag is not None:
        state = load_checkpoint(engine, groups, tag, allow_pickle=request.allow_pickle)
        progress = Progress(state.step, state.first_validation_loss if step > manifest.start_step else None)
    summary = Trainer(resolved, groups, engine, data, run, manifest, progress, callbacks).train(stop)
    engine.close()
    return summary, manifest


def _begun(
    groups: ParallelGroups,
    run: RunDirectory,
    tag: Path,
    manifest: RunManifest,
    request: RunRequest,
    index: int,
    names: RunNames,
) -> RunManifest:
    """The manifest of stage `index`, which begins at the checkpoint `tag`, where the stage of `manifest` ended."""
    step = files.tag_step(tag)
    found: list[list[dict[str, Any]]] = []
    on_rank_zero(groups, lambda: found.append(validation_history(run.metrics, manifest.start_step, step)))
    history = groups.from_rank_zero(found[0] if found else None)

    def begun() -> RunManifest:
        state = read_state(tag)
        end = StageEnd(step, state.config["training"], state.first_validation_loss, history)
        begun = begin_stage(manifest, end, request.stages[index], names)
        return replace(begun, stages_ahead=planned_stages(request.stages[index + 1 :]))

    return together(groups, begun)


def _take_metrics(run: RunDirectory, tag: Path) -> None:
    """Begin with what another run, which goes on here, has measured: its evaluations are part of the history."""
    origin = RunDirectory(tag.parent.parent)
    if tag.parent == origin.checkpoints and origin.root.resolve() != run.root.resolve():
        copy_metrics(origin, run)


def _free_memory(groups: ParallelGroups) -> None:
    """An engine is made of cycles: without this it would live beside the next stage's."""
    gc.collect()
    if groups.device.type == "cuda":
        torch.cuda.empty_cache()


def _check_ahead(stages: Sequence[ResolvedStage], groups: ParallelGroups) -> None:
    """Say at once what would end the run at the start of a later stage: frozen parameters that there are not are an
    error; data that is not here is told, as it may still be under way."""
    for stage in stages:
        check_frozen(stage.run, groups)
        try:
            if groups.rank == 0:
                check_sources(stage.run.config.data, stage.run.config.model.vocab_size)
        except DataError as error:
            _logger.warning("stage %s cannot begin yet: %s", stage.name, error)


def _require_room(stages: Sequence[ResolvedStage], environment: ProcessEnvironment, groups: ParallelGroups) -> None:
    on_cpu = groups.device.type == "cpu"
    for stage in stages:
        require_room(stage.run, host_memory_bytes(), environment.local_world_size, on_cpu=on_cpu)


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
    found = None if (source / CONFIG).exists() else newest_whole(folder)
    return str(found or source)


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


def _record(part: _StageRun, run: RunDirectory, manifest: RunManifest, step: int, world_size: int) -> None:
    run.write_manifest(manifest)
    run.record_configuration(part.request.stages, part.request.source_text)
    if part.starts:
        run.record_start(step, world_size, part.request.argv)
