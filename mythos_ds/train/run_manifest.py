"""What a run is, fixed at its first start. No torch.

megatron-core shuffles all epochs of a run jointly, so the order of the samples changes with the planned length. A run
therefore pins its length and data at the first start; going on for longer appends a *phase*, a new dataset of its own
length and seed that begins where the last one ends.

A run of several training stages pins these for the stage it is in; the stages behind it are kept as they were.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.depth_distribution import FRESH, StageStart
from mythos_ds.config.resolve import ResolvedRun, ResolvedStage
from mythos_ds.config.rules.check import steps_of
from mythos_ds.config.schema import BatchRamp, DataConfig, RunConfig
from mythos_ds.errors import CheckpointError
from mythos_ds.io import parse_json
from mythos_ds.train.lr_schedule import PlannedLength

DATASET, DATA_FILES, WEIGHTS, RAMP = "dataset", "data_files", "init_from", "global_batch_ramp"
OPENED = (DATASET, DATA_FILES, WEIGHTS)
"""What is pinned only once it was opened: no configuration says it."""
BUILT_IN_CORPUS = "the built-in corpus"


@dataclass(frozen=True)
class Phase:
    """Steps `start_step .. end_step - 1` read a dataset of their own, shuffled with `seed`.

    `decided_at` is the step at which this phase (and with it the run's new length) was planned.
    """

    start_step: int
    end_step: int
    seed: int
    decided_at: int = 0


@dataclass(frozen=True)
class FormerStage:
    """A training stage that is behind.

    name: None where the run's file listed no stages; phases: the last one ends where the stage did; samples, tokens:
    what was read in it; final_lr: the scheduled rate of its last step; first_validation_loss: before its first step;
    validation: {"step", "losses"} of each evaluation in it, the losses in nats per token by loop count.
    """

    name: str | None
    phases: tuple[Phase, ...]
    pinned: dict[str, Any]
    samples: int
    tokens: int
    final_lr: float
    first_validation_loss: float | None
    validation: list[dict[str, Any]]

    @property
    def end_step(self) -> int:
        """Completed steps of the run at the stage's end."""
        return self.phases[-1].end_step


@dataclass(frozen=True)
class PlannedStage:
    """A training stage that is still ahead."""

    name: str
    steps: int
    tokens: int


@dataclass(frozen=True)
class _Stored:
    """What a file holds of a manifest."""

    pinned: dict[str, Any]
    phases: list[Phase]
    stage: str | None = None
    former_stages: tuple[FormerStage, ...] = ()
    stages_ahead: tuple[PlannedStage, ...] = ()


@dataclass(frozen=True)
class RunManifest:
    """What a run is, fixed at its first start, or at the start of its training stage. `pinned` must not change; phases
    are only appended. All steps are the run's, counted through all stages."""

    pinned: dict[str, Any]
    phases: tuple[Phase, ...]
    stage: str | None = None
    """The name of the training stage; None where the file lists none."""
    former_stages: tuple[FormerStage, ...] = ()
    stages_ahead: tuple[PlannedStage, ...] = ()

    @classmethod
    def of(cls, content: Any, where: str) -> "RunManifest":
        """What `as_dict` gave. Raises CheckpointError, which begins with `where`, for anything else."""
        stored = parse_json(json.dumps(content), where, _Stored)
        _check_pinned(stored.pinned, where)
        end = 0
        for former in stored.former_stages:
            _check_pinned(former.pinned, f"{where}: former_stages")
            end = _checked_end(former.phases, end, f"{where}: former_stages")
        _checked_end(stored.phases, end, where)
        return cls(stored.pinned, tuple(stored.phases), stored.stage, stored.former_stages, stored.stages_ahead)

    @classmethod
    def from_config(cls, content: dict[str, Any], init_from: dict[str, Any] | None, where: str) -> "RunManifest":
        """The manifest of a run that was never longer than its configuration says; its dataset is not known. Raises
        CheckpointError."""
        try:
            config = RunConfig.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(
                f"{where}: config.{'.'.join(map(str, first['loc']))}: {first['msg']}", code="MDS506"
            ) from None
        made = _manifest(config, steps_of(config.training))
        return made if init_from is None else with_weights(made, init_from)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        content: dict[str, Any] = {"phases": [asdict(phase) for phase in self.phases], "pinned": self.pinned}
        if self.stage is not None or self.former_stages:
            content["stage"] = self.stage
            content["former_stages"] = [asdict(former) for former in self.former_stages]
            content["stages_ahead"] = [asdict(planned) for planned in self.stages_ahead]
        return content

    @property
    def start_step(self) -> int:
        """Completed steps of the run at the stage's start."""
        return self.phases[0].start_step

    @property
    def total_steps(self) -> int:
        """Step count at which the stage is complete."""
        return self.phases[-1].end_step

    @property
    def planned_steps(self) -> int:
        """Step count at which all stages are complete."""
        return self.total_steps + sum(planned.steps for planned in self.stages_ahead)

    @property
    def planned_tokens(self) -> int:
        """Tokens of all stages."""
        return self.tokens_at(self.total_steps) + sum(planned.tokens for planned in self.stages_ahead)

    @property
    def lengths(self) -> list[PlannedLength]:
        """The planned lengths of the stage for the learning-rate schedule, in its own steps."""
        start = self.start_step
        return [PlannedLength(max(0, phase.decided_at - start), phase.end_step - start) for phase in self.phases]

    @property
    def start_lr(self) -> float:
        """The rate at which the stage before ended; 0 in the first."""
        return self.former_stages[-1].final_lr if self.former_stages else 0.0

    @property
    def start(self) -> StageStart:
        """Where the stage began."""
        if not self.former_stages:
            return FRESH
        mean = int(self.former_stages[-1].pinned["model"]["mean_recurrence"])
        return StageStart(self.start_step, self._samples_before, mean)

    @property
    def batches(self) -> BatchSchedule:
        """The global batch of each step of the stage."""
        ramp = self.pinned.get(RAMP)
        return BatchSchedule(self.pinned["global_batch_size"], None if ramp is None else BatchRamp.model_validate(ramp))

    @property
    def starting_weights(self) -> dict[str, Any] | None:
        """What the run's weights were read from at its start; None where they were random."""
        return self.pinned.get(WEIGHTS)

    def samples_at(self, step: int) -> int:
        """Sequences that the run has read when `step` steps of it are complete."""
        return self._samples_before + self.batches.samples(step - self.start_step)

    def tokens_at(self, step: int) -> int:
        """Tokens that the run has read when `step` steps of it are complete."""
        own = self.batches.samples(step - self.start_step) * int(self.pinned["seq_len"])
        return sum(former.tokens for former in self.former_stages) + own

    def phase_index(self, step: int) -> int:
        """Index of the phase that optimizer step `step` reads from; the last one's once the stage is complete."""
        return next((i for i, phase in enumerate(self.phases) if step < phase.end_step), len(self.phases) - 1)

    def back_at(self, step: int) -> "RunManifest":
        """The manifest as it was at `step`: phases and stages decided on but never begun are forgotten."""
        if self.former_stages and self.start_step >= step:
            last = self.former_stages[-1]
            return RunManifest(last.pinned, last.phases, last.name, self.former_stages[:-1]).back_at(step)
        begun = tuple(phase for phase in self.phases if phase.start_step < max(step, 1))
        return replace(self, phases=begun)

    @property
    def _samples_before(self) -> int:
        return sum(former.samples for former in self.former_stages)


def _check_pinned(pinned: dict[str, Any], where: str) -> None:
    needed = {"model": dict, "seq_len": int, "global_batch_size": int}
    wrong = [name for name, kind in needed.items() if type(pinned.get(name)) is not kind]
    if wrong:
        raise CheckpointError(f"{where}: pinned.{wrong[0]}: missing, or of another kind", code="MDS506")
    try:
        BatchRamp.model_validate(pinned[RAMP]) if RAMP in pinned else None
    except ValidationError:
        raise CheckpointError(
            f"{where}: pinned.{RAMP}: given {pinned[RAMP]!r}; allowed: a ramp", code="MDS506"
        ) from None


def _checked_end(phases: Sequence[Phase], start: int, where: str) -> int:
    """Where phases from step `start` on end. Raises CheckpointError unless they follow each other."""
    ends = [start, *(phase.end_step for phase in phases)]
    if not phases or any(
        not phase.start_step == former < phase.end_step for phase, former in zip(phases, ends, strict=False)
    ):
        raise CheckpointError(
            f"{where}: phases: given {ends[1:]} as their ends; allowed: steps that follow each other", code="MDS506"
        )
    return ends[-1]


def new_manifest(resolved: ResolvedRun) -> RunManifest:
    """The manifest of a run that starts now; its dataset is pinned once that has been opened (`with_dataset`)."""
    return _manifest(resolved.config, resolved.max_steps)


def staged_manifest(stages: Sequence[ResolvedStage]) -> RunManifest:
    """`new_manifest` of the first of the stages, with the others ahead."""
    first = new_manifest(stages[0].run)
    return replace(first, stage=stages[0].name, stages_ahead=planned_stages(stages[1:]))


def planned_stages(stages: Sequence[ResolvedStage]) -> tuple[PlannedStage, ...]:
    """Stages that are ahead."""
    return tuple(PlannedStage(str(stage.name), stage.run.max_steps, stage.run.total_tokens) for stage in stages)


def _manifest(config: RunConfig, total_steps: int) -> RunManifest:
    training = config.training
    pinned: dict[str, Any] = {
        "seq_len": training.seq_len,
        "global_batch_size": training.global_batch_size,
        "seed": training.seed,
        "optimizer": training.optimizer,
        "dtype": training.dtype,
        "model": config.model.model_dump(mode="json"),
    }
    if training.global_batch_ramp is not None:
        pinned[RAMP] = training.global_batch_ramp.model_dump()
    # What the optimizer's groups depend on, where it is not as usual.
    if training.frozen:
        pinned["frozen"] = list(training.frozen)
    if training.injection_lr is not None:
        pinned["injection_has_own_lr"] = True
    if training.init_from is not None:
        pinned[WEIGHTS] = {"name": Path(training.init_from).resolve().name}
    return RunManifest(pinned, (Phase(0, total_steps, training.seed),))


def with_weights(manifest: RunManifest, identity: dict[str, Any]) -> RunManifest:
    """The manifest with what the run's weights were read from."""
    return replace(manifest, pinned={**manifest.pinned, WEIGHTS: identity})


def data_files(data: DataConfig) -> dict[str, Any]:
    """What the data's files are called, for messages."""
    named = [dataset.prefix for dataset in data.datasets or ()] or [BUILT_IN_CORPUS]
    held_out = [dataset.prefix for dataset in data.own_validation]
    return {
        "datasets": named,
        **({"tokenizer": data.tokenizer} if data.tokenizer else {}),
        **({"validation": held_out} if held_out else {}),
    }


def longer(manifest: RunManifest, total_steps: int, step: int) -> RunManifest:
    """The manifest with a phase up to `total_steps`, decided on at `step`."""
    last = manifest.phases[-1]
    phase = Phase(last.end_step, total_steps, next_seed(manifest), decided_at=step)
    return replace(manifest, phases=(*manifest.phases, phase))


def next_seed(manifest: RunManifest) -> int:
    """The seed of the phase that comes next: no two phases of a run share one."""
    phases = [*(phase for former in manifest.former_stages for phase in former.phases), *manifest.phases]
    return phases[0].seed + len(phases)
