"""What a checkpoint says of itself beside its tensors, read and checked without DeepSpeed."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint.manifest import STATE
from mythos_ds.errors import CheckpointError
from mythos_ds.io import parse_json, read_json

PORTABLE = "portable"
"""Key of a layout: the kinds of tensors, where the checkpoint is portable."""
STEPS = "optimizer_steps"
_KIND = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds beside the engine's tensors (weights, optimizer state and router buffers).

    `layout` are the facts that must be equal for DeepSpeed's files to fit; `consumed_samples` counts sequences;
    `first_validation_loss` is that before the training stage's first step, in nats per token; `init_from` says what
    weights the run started from (name, kind, SHA-256), None where they were random.
    """

    step: int
    consumed_samples: int
    first_validation_loss: float | None
    layout: dict[str, Any]
    config: dict[str, Any]
    init_from: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    """What the run's manifest said at the save, so that a checkpoint goes on without it; None in older ones."""
    consumed_tokens: int | None = None
    """Of all training stages; None, and not written, where the run has had one only."""


@dataclass(frozen=True)
class SavedLayout:
    """A layout as a checkpoint names it. `pp_size`: number of stages, or the size of each."""

    ep_size: int = 1
    pp_size: int | tuple[int, ...] = 1
    portable: tuple[str, ...] | None = None
    optimizer_steps: float = 0.0

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.pp_size if isinstance(self.pp_size, int) else len(self.pp_size)


@dataclass(frozen=True)
class _Training:
    seq_len: int
    seed: int
    injection_lr: float | None = None
    frozen: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Data:
    data_dir: str
    tokenizer: str | None = None


@dataclass(frozen=True)
class _Config:
    """What is read of the configuration that a run had; of the model, `ModelConfig` judges."""

    model: dict[str, Any]
    training: _Training
    data: _Data


def read_state(tag: Path) -> TrainingState:
    """Step, position and layout of a checkpoint, without its tensors. Raises CheckpointError, with file and key, for
    what is no training state."""
    path = tag / STATE
    state: TrainingState = read_json(path, TrainingState)
    for name in ("step", "consumed_samples"):
        if getattr(state, name) < 0:
            raise CheckpointError(f"{path}: {name}: {getattr(state, name)} given; allowed: at least 0")
    layout_of_state(state, path)
    parse_json(json.dumps(state.config), f"{path}: config", _Config)
    return state


def read_layout(tag: Path) -> dict[str, Any]:
    """The layout that wrote `tag`. Raises CheckpointError where it does not say."""
    return {"pp_size": 1, **read_state(tag).layout}


def layout_of_state(state: TrainingState, path: Path) -> SavedLayout:
    """The layout in a state that was read from `path`. Raises CheckpointError for one that there cannot be."""
    layout: SavedLayout = parse_json(json.dumps(state.layout), f"{path}: layout", SavedLayout)
    for name, value in (("ep_size", layout.ep_size), ("pp_size", layout.stages)):
        if value < 1:
            raise CheckpointError(f"{path}: layout.{name}: {value} given; allowed: at least 1")
    if PORTABLE not in state.layout and "ep_size" not in state.layout:
        raise CheckpointError(f"{path}: layout: names neither ep_size nor {PORTABLE}")
    if odd := [kind for kind in layout.portable or () if not _KIND.fullmatch(kind)]:
        raise CheckpointError(f"{path}: layout.{PORTABLE}: {odd[0]!r} given; allowed: names of kinds of tensors")
    return layout
