"""A mythos model folder as the target of a conversion: which tensors it must hold, in which type, and its config."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_files import copy_tokenizer, has_tokenizer
from mythos_ds.errors import CheckpointError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.reader import TensorSource, TensorSpec

ROUTER_BUFFERS = ("router.bias", "router.loop_bias", "router.loop_updates")
_FP32_PARTS = ("router.", "injection.", "halting.", "gate.", "lora.scale", "loop_embedding.")


def expected_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """What the folder of such a model holds, in order and in fp32; no memory is taken."""
    with torch.device("meta"):
        state = MythosModel(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    return {name: TensorSpec(torch.float32, tuple(v.shape)) for name, v in state.items() if name not in tied}


def folder_dtype(name: str, spec: TensorSpec, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in a folder of `dtype`: what the model computes in fp32 stays fp32."""
    kept = len(spec.shape) < 2 or any(part in name for part in _FP32_PARTS)
    return torch.float32 if kept else dtype


class WholeModel:
    """`source`'s tensors as all of a model's, in its order and cast once; None keeps the source's types.

    Tensors that the source `may_lack`, by the ends of their names, are zero. Raises CheckpointError for a tensor that
    is missing, of another shape or unknown.
    """

    def __init__(
        self, source: TensorSource, config: ModelConfig, dtype: torch.dtype | None, may_lack: tuple[str, ...] = ()
    ):
        self.source = source
        given, wanted = source.specs(), expected_specs(config)
        unknown = sorted(set(given) - set(wanted))
        if unknown:
            raise CheckpointError(f"{unknown[0]}: not a tensor of this configuration")
        self._specs: dict[str, TensorSpec] = {}
        self._zero: list[str] = []
        for name, spec in wanted.items():
            if name not in given:
                if not name.endswith(may_lack):
                    raise CheckpointError(f"{name}: not in the given weights")
                self._zero.append(name)
            elif given[name].shape != spec.shape:
                raise CheckpointError(f"{name}: has the shape {given[name].shape}, the configuration says {spec.shape}")
            own = given.get(name, spec).dtype
            self._specs[name] = TensorSpec(own if dtype is None else folder_dtype(name, spec, dtype), spec.shape)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the model."""
        return dict(self._specs)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        spec = self._specs[name]
        if name in self._zero:
            value = torch.zeros(spec.shape, dtype=spec.dtype)
            return value if rows is None else value[rows]
        return self.source.read(name, rows).to(spec.dtype)


def check_tokenizer(tokenizer: Path, config: ModelConfig) -> None:
    """Raises DataError for a file, or a folder's, that is no tokenizer, and CheckpointError for one of more pieces than
    the model has."""
    if has_tokenizer(tokenizer) and (size := Tokenizer.load(tokenizer).vocab_size) > config.vocab_size:
        raise CheckpointError(f"{tokenizer}: has {size} pieces; allowed: at most the model's {config.vocab_size}")


def write_config(folder: Path, config: ModelConfig, metadata: dict[str, Any], tokenizer: Path) -> None:
    """What `tokenizer`, a file or a model's folder, has of tokenizer, chat template, licences and cards; config.json
    comes last: a folder without it is not a model."""
    copy_tokenizer(tokenizer, folder)
    content = {"format": 1, "model": config.model_dump(mode="json"), "facts": metadata}
    seal(folder, content)
