"""From a training checkpoint to a model in one folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.deepspeed_format import WEIGHTS
from mythos_ds.checkpoint.portable import open_state
from mythos_ds.checkpoint.training_state import TrainingState, read_state
from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.model_target import WholeModel, check_tokenizer, write_config
from mythos_ds.conversion.written_model import write_model
from mythos_ds.data.builtin import BuiltinData
from mythos_ds.data.tokenizer_files import ChatFormat
from mythos_ds.errors import CheckpointError, naming
from mythos_ds.io import read_json, where_searched
from mythos_ds.provenance import last_names
from mythos_ds.weights.built_in import model_path
from mythos_ds.weights.model_folder import checked_config
from mythos_ds.weights.reader import TensorSource
from mythos_ds.weights.writer import MAX_FILE_BYTES


def newest_tag(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest complete one of a run, or of its checkpoint folder.

    Raises CheckpointError, naming what is wrong with each, where none is complete.
    """
    if manifest.is_tag(path.name):
        manifest.verify(path, 0, 1)
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    faults = []
    for tag in manifest.list_tags(folder):
        try:
            manifest.verify(tag, 0, 1)
            return tag
        except CheckpointError as error:
            faults.append(str(error))
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{path}: no such folder{where_searched(path)}; allowed: a run or a checkpoint", code="MDS513"
        )
    raise CheckpointError("\n".join([f"{folder}: no complete checkpoint", *faults]), code="MDS502")


def merged_source(tag: Path, model: ModelConfig, dtype: str) -> TensorSource:
    """The whole model of a checkpoint, from its fp32 masters. Raises CheckpointError unless every tensor that the
    configuration asks for is there once, with the right shape."""
    cast = None if dtype == "float32" else torch.bfloat16
    with naming(tag):
        return WholeModel(open_state(tag)[0][WEIGHTS], model, cast)


def merge(
    tag: Path,
    output: Path,
    *,
    dtype: str = "float32",
    jobs: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
    tokenizer: Path | None = None,
    progress: Callable[[int], None] | None = None,
    break_lock: bool = False,
) -> None:
    """Write the model of the verified checkpoint `tag` to `output`; its configuration comes last. Raises OutputError
    where another job writes there, unless `break_lock`."""
    state = read_state(tag)
    model = model_of(state)
    source, own = merged_source(tag, model, dtype), tokenizer or tokenizer_of(state)
    check_tokenizer(own, model)

    def finish(output: Path) -> None:
        write_config(output, model, {**_carried(own), **metadata_of(state)}, own, chat_of(state))

    write_model(
        source,
        output,
        finish,
        command="merge",
        made_from=f"{tag.resolve().parent.parent.name}/{tag.name}",
        jobs=jobs,
        max_file_bytes=max_file_bytes,
        progress=progress,
        break_lock=break_lock,
    )


def _carried(tokenizer: Path) -> dict[str, Any]:
    """What the folder of a run's tokenizer says of the model that the run may have started from."""
    path = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / "config.json"
    content = read_json(path) if path.is_file() else {}
    facts = content.get("facts") if isinstance(content, dict) else None
    return {name: facts[name] for name in ("base_model", "license") if name in facts} if isinstance(facts, dict) else {}


def model_of(state: TrainingState) -> ModelConfig:
    """The model's configuration in a training state. Raises CheckpointError for one that there cannot be."""
    return checked_config(state.config["model"], f"{manifest.STATE}: config.model")


def metadata_of(state: TrainingState) -> dict[str, Any]:
    """What is worth knowing about a merged model."""
    training = state.config["training"]
    prompts = (state.config.get("monitor") or {}).get("sample_prompts")
    return {
        "step": state.step,
        "tokens": state.consumed_samples * training["seq_len"],
        "seq_len": training["seq_len"],
        "training": last_names(training),
        "data": last_names(state.config["data"]),
        **({"sample_prompt": prompts[0]} if prompts else {}),
        **({"init_from": state.init_from} if state.init_from else {}),
    }


def chat_of(state: TrainingState) -> ChatFormat | None:
    """The form of the conversations that the run learnt from last, in whichever training stage; None where it read text
    in all of them."""
    run = state.run or {}
    stages = [*(former["pinned"] for former in run.get("former_stages", ())), run.get("pinned", {})]
    chats = [(pinned.get("dataset") or {}).get("conversations") for pinned in stages]
    found = next((chat for chat in reversed(chats) if chat is not None), None)
    return None if found is None else ChatFormat(found["chat_template"], frozenset(found["ends"]))


def tokenizer_of(state: TrainingState) -> Path:
    """The run's tokenizer, whether it is at hand or not."""
    data = state.config["data"]
    given = data.get("tokenizer")
    return model_path(given) if given else BuiltinData.under(Path(data["data_dir"])).tokenizer
