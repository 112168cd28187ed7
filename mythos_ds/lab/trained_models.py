"""The models that runs have left, and text to look at them with."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos_ds.analysis import exit_rule_comparison
from mythos_ds.config.schema import RunConfig
from mythos_ds.data.batches import Batch
from mythos_ds.data.held_out import held_out_batches
from mythos_ds.lab.spec import Arm, RunSpec
from mythos_ds.lab.study import Results
from mythos_ds.lab.variants import CONTROLS, JacobianPenalty
from mythos_ds.lab.worker import MODEL, SPEC
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import load_model

Folders = Mapping[tuple[str, int], Path]

_ROWS = 8


def trained_model(folder: Path) -> MythosModel:
    """The model of a run, as its variant of the block."""
    spec = RunSpec.from_json((folder / SPEC).read_text(encoding="utf-8"))
    model = load_model(folder / MODEL, None if spec.control is None else CONTROLS[spec.control])
    if isinstance(model.recurrent, JacobianPenalty):  # acts in training only
        model.recurrent = model.recurrent.block
    return model


def text(folder: Path, *, batches: int, training: bool = False) -> list[Batch]:
    """The first batches of held-out text (or of text to train on) at a run's length, with token classes."""
    spec = RunSpec.from_json((folder / SPEC).read_text(encoding="utf-8"))
    config = RunConfig.model_validate(spec.config)
    found, tokenizer = held_out_batches(
        Path(config.data.data_dir),
        Path("none"),
        rows=_ROWS,
        batches=batches,
        seq_len=config.training.seq_len,
        vocab_size=config.model.vocab_size,
        seed=1,
        training=training,
    )
    for batch in found:
        batch["classes"] = exit_rule_comparison.token_classes(tokenizer, batch["tokens"])
    return found


def measured(
    results: Results,
    folders: Folders,
    arms: Sequence[Arm],
    measure: Callable[[MythosModel, list[Batch]], dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """What `measure` says of the arms' models that did not diverge, by arm and in the order of seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        for (name, seed), result in sorted(results.items()):
            if name == arm.name and "diverged" not in result:
                folder = folders[name, seed]
                found.setdefault(arm.name, []).append(measure(trained_model(folder), text(folder, batches=2)))
    return found
