"""What runs inside the processes of test_stages.py: one run of several training stages, ended at chosen places and
started again in the same processes, with notes of what it read and held."""

import gc
import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve_stages
from mythos_ds.config.training_stages import stages_from
from mythos_ds.data.batches import Batch
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import MythosError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.callbacks import Callback, CallbackState
from mythos_ds.train.data_loader import TextLoader
from mythos_ds.train.run import RunRequest, train
from mythos_ds.train.run_manifest import RunManifest
from mythos_ds.train.summary import RunSummary


class EndedError(MythosError):
    """Stands for a kill: nothing after it runs."""


class EndAt(Callback):
    """Ends the run at a call, named by its method and the run's completed steps."""

    def __init__(self, place: list[Any] | None):
        self.place = place

    def before_step(self, state: CallbackState) -> None:
        self._end("before_step", state.step)

    def after_step(self, state: CallbackState) -> None:
        self._end("after_step", state.step)

    def on_save(self, state: CallbackState, checkpoint: Path) -> None:
        self._end("on_save", state.step)

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        self._end("on_end", state.step)

    def _end(self, *place: Any) -> None:
        if list(place) == self.place:
            raise EndedError(f"ended at {place}")


class NotedLoader(TextLoader):
    """Notes a hash of each sequence of each step that it hands out."""

    notes: dict[str, list[str]]

    def steps(self, step: int) -> Iterator[list[Batch]]:
        for batches in super().steps(step):
            rows = [row for batch in batches for row in batch["tokens"]]
            self.notes[str(step)] = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows]
            yield batches
            step += 1


def work(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run: {folder, config, overrides, ends}; `ends` are the places where its starts end; a last goes through."""
    ParallelGroups.close = lambda self: None  # type: ignore[method-assign]  # the next start takes the same groups
    return [_run(**run) for run in runs]


def _run(
    folder: str,
    config: str,
    ends: list[list[Any]],
    overrides: list[str] = [],  # noqa: B006
    resume: str = "auto",
    stage: str | None = None,
) -> dict[str, Any]:
    notes: dict[str, list[str]] = {}
    alive: list[int] = []
    error = ""
    for place in [*ends, None]:
        models: list[weakref.ref[MythosModel]] = []

        def adapt(model: MythosModel, models: list[weakref.ref[MythosModel]] = models) -> None:
            alive.append(sum(found() is not None for found in models))
            models.append(weakref.ref(model))

        error = _start(folder, config, overrides, resume, stage, EndAt(place), adapt, notes)
        gc.collect()
        if place is not None and not error:
            raise AssertionError(f"the run did not come to {place}")
    return {"notes": notes, "alive": alive, "error": error}


def _start(
    folder: str,
    config: str,
    overrides: list[str],
    resume: str,
    stage: str | None,
    callback: EndAt,
    adapt: Any,
    notes: dict[str, list[str]],
) -> str:
    environment = ProcessEnvironment.detect(os.environ)
    loaded = load_config(config, overrides)
    request = RunRequest(
        resolve_stages(stages_from(loaded.stages, stage, config), environment.world_size),
        loaded.text,
        Path(folder),
        resume,
        tuple(overrides),
        config_file=config,
        new_stage=stage,
    )

    def open_data(resolved: ResolvedRun, manifest: RunManifest, groups: ParallelGroups, step: int) -> NotedLoader:
        loader = NotedLoader.open(resolved, manifest, groups, step)
        assert isinstance(loader, NotedLoader)
        loader.notes = notes
        return loader

    try:
        train(request, environment, open_data=open_data, adapt=adapt, callbacks=[callback])
    except EndedError:
        return "ended"
    except MythosError as error:
        return str(error)
    return ""
