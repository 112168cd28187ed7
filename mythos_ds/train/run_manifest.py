"""What a run is, fixed at its first start. No torch.

megatron-core shuffles all epochs of a run jointly, so the order of the samples changes with the planned length. A run
therefore pins its length and data at the first start; going on for longer appends a *phase*, a new dataset of its own
length and seed that begins where the last one ends.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.rules.check import steps_of
from mythos_ds.config.schema import ModelConfig, RunConfig
from mythos_ds.errors import CheckpointError
from mythos_ds.io import parse_json
from mythos_ds.train.lr_schedule import PlannedLength

_DATASET, _WEIGHTS = "dataset", "init_from"


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
class _Stored:
    """What a file holds of a manifest."""

    pinned: dict[str, Any]
    phases: list[Phase]


@dataclass(frozen=True)
class RunManifest:
    """What a run is, fixed at its first start. `pinned` must not change; phases are only appended."""

    pinned: dict[str, Any]
    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, content: Any, where: str) -> "RunManifest":
        """What `as_dict` gave. Raises CheckpointError, which begins with `where`, for anything else."""
        stored = parse_json(json.dumps(content), where, _Stored)
        needed = {"model": dict, "seq_len": int, "global_batch_size": int}
        wrong = [name for name, kind in needed.items() if type(stored.pinned.get(name)) is not kind]
        if wrong:
            raise CheckpointError(f"{where}: pinned.{wrong[0]}: missing, or of another kind")
        ends = [0, *(phase.end_step for phase in stored.phases)]
        if not stored.phases or any(
            not phase.start_step == former < phase.end_step for phase, former in zip(stored.phases, ends, strict=False)
        ):
            raise CheckpointError(
                f"{where}: phases: given {ends[1:]} as their ends; allowed: steps that follow each other"
            )
        return cls(stored.pinned, tuple(stored.phases))

    @classmethod
    def from_config(cls, content: dict[str, Any], init_from: dict[str, Any] | None, where: str) -> "RunManifest":
        """The manifest of a run that was never longer than its configuration says; its dataset is not known. Raises
        CheckpointError."""
        try:
            config = RunConfig.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(f"{where}: config.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        made = _manifest(config, steps_of(config.training))
        return made if init_from is None else with_weights(made, init_from)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"phases": [asdict(phase) for phase in self.phases], "pinned": self.pinned}

    @property
    def total_steps(self) -> int:
        """Step count at which the run is complete."""
        return self.phases[-1].end_step

    @property
    def lengths(self) -> list[PlannedLength]:
        """The planned lengths for the learning-rate schedule."""
        return [PlannedLength(phase.decided_at, phase.end_step) for phase in self.phases]

    @property
    def starting_weights(self) -> dict[str, Any] | None:
        """What the run's weights were read from at its start; None where they were random."""
        return self.pinned.get(_WEIGHTS)

    def phase_index(self, step: int) -> int:
        """Index of the phase that optimizer step `step` reads from; the last one's once the run is complete."""
        return next((i for i, phase in enumerate(self.phases) if step < phase.end_step), len(self.phases) - 1)


def new_manifest(resolved: ResolvedRun) -> RunManifest:
    """The manifest of a run that starts now; its dataset is pinned once that has been opened (`with_dataset`)."""
    return _manifest(resolved.config, resolved.max_steps)


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
    # What the optimizer's groups depend on, where it is not as usual.
    if training.frozen:
        pinned["frozen"] = list(training.frozen)
    if training.injection_lr is not None:
        pinned["injection_has_own_lr"] = True
    if training.init_from is not None:
        pinned[_WEIGHTS] = {"name": Path(training.init_from).resolve().name}
    return RunManifest(pinned, (Phase(0, total_steps, training.seed),))


def with_dataset(manifest: RunManifest, identity: dict[str, Any]) -> RunManifest:
    """The manifest with its dataset pinned. Raises CheckpointError when another one is pinned already."""
    stored = manifest.pinned.get(_DATASET)
    if stored is not None:
        _refuse(_differences(_DATASET, stored, identity))
    return RunManifest({**manifest.pinned, _DATASET: identity}, manifest.phases)


def with_weights(manifest: RunManifest, identity: dict[str, Any]) -> RunManifest:
    """The manifest with what the run's weights were read from."""
    return RunManifest({**manifest.pinned, _WEIGHTS: identity}, manifest.phases)


def continue_manifest(manifest: RunManifest, wanted: RunManifest, step: int) -> RunManifest:
    """The manifest for going on at `step` with the configuration that `wanted` was made from.

    A larger length appends a phase; phases decided on but never begun are forgotten. Raises CheckpointError naming
    every pinned value that differs, or a length below the pinned one.
    """
    stored = {name: value for name, value in manifest.pinned.items() if name not in (_DATASET, _WEIGHTS)}
    pinned = {name: value for name, value in wanted.pinned.items() if name != _WEIGHTS}
    stored["model"] = {**_added_later(), **stored["model"]}
    begun = [phase for phase in manifest.phases if phase.start_step < max(step, 1)]
    manifest = RunManifest(manifest.pinned, tuple(begun))
    problems = _differences("", stored, pinned) + _other_weights(manifest, wanted)
    if wanted.total_steps < manifest.total_steps:
        problems.append(
            f"training length: {wanted.total_steps} steps now, {manifest.total_steps} when the run was started; "
            "the sample order depends on the length: keep it, or raise it to train on"
        )
    _refuse(problems)
    if wanted.total_steps == manifest.total_steps:
        return manifest
    last = manifest.phases[-1]
    seed = manifest.phases[0].seed + len(manifest.phases)
    phase = Phase(last.end_step, wanted.total_steps, seed, decided_at=step)
    return RunManifest(manifest.pinned, (*manifest.phases, phase))


def _other_weights(manifest: RunManifest, wanted: RunManifest) -> list[str]:
    """The weights are gone from a run that goes on; another name for them would have no effect."""
    old, new = (pinned.pinned.get(_WEIGHTS, {}).get("name") for pinned in (manifest, wanted))
    if new is None or new == old:
        return []
    return [f"training.init_from: {new!r} now, {'random weights' if old is None else repr(old)} at the run's start"]


def _added_later() -> dict[str, Any]:
    """What a key of the model meant before there was such a key: its default."""
    defaults = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def _refuse(problems: list[str]) -> None:
    if problems:
        head = "this run directory belongs to another run (use a new --run-dir, or undo the change):"
        raise CheckpointError("\n".join([head, *problems]))


def _differences(prefix: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = ((f"{prefix}.{key}".lstrip("."), old.get(key), new.get(key)) for key in keys)
        return [line for pair in pairs for line in _differences(*pair)]
    return [] if old == new else [f"{prefix}: {new!r} now, {old!r} when the run was started"]
