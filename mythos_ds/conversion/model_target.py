"""A mythos model folder as the target of a conversion: which tensors it must hold, in which type, and its config."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_files import ChatFormat, copy_tokenizer, has_tokenizer, write_chat_format
from mythos_ds.errors import CheckpointError
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.reader import TensorSource, TensorSpec
from mythos_ds.weights.whole_model import check_whole, expected_specs

ROUTER_BUFFERS = ("router.bias", "router.loop_bias", "router.loop_updates")
_FP32_PARTS = ("router.", "injection.", "halting.", "gate.", "lora.scale", "loop_embedding.")


def folder_dtype(name: str, spec: TensorSpec, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in a folder of `dtype`: what the model computes in fp32 stays fp32."""
    kept = len(spec.shape) < 2 or any(part in name for part in _FP32_PARTS)
    return torch.float32 if kept else dtype


class WholeModel:
    """`source`'s tensors as all of a model's, in its order and cast once; None keeps the source's types.

    Tensors that the source `may_lack`, by the ends of their names, are zero. Raises CheckpointError as `check_whole`
    does.
    """

    def __init__(
        self, source: TensorSource, config: ModelConfig, dtype: torch.dtype | None, may_lack: tuple[str, ...] = ()
    ):
        self.source = source
        given = source.specs()
        check_whole(given, config, may_lack)
        wanted = expected_specs(config)
        self._specs: dict[str, TensorSpec] = {}
        self._zero: list[str] = []
        for name, spec in wanted.items():
            if name not in given:
                self._zero.append(name)
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


def write_config(
    folder: Path, config: ModelConfig, metadata: dict[str, Any], tokenizer: Path, chat: ChatFormat | None = None
) -> None:
    """What `tokenizer`, a file or a model's folder, has of tokenizer, chat template, licences and cards; of `chat` the
    template takes the place of its own, and generation ends where answers do. config.json comes last: a folder without
    it is not a model."""
    copy_tokenizer(tokenizer, folder)
    if chat is not None and has_tokenizer(folder):
        write_chat_format(folder, chat, Tokenizer.load(folder).ends())
    content = {"format": 1, "model": config.model_dump(mode="json"), "facts": metadata}
    seal(folder, content)
