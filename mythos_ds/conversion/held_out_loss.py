"""What a conversion costs in loss: the same held-out text through the model before and after."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from mythos_ds.config.schema import ModelConfig
from mythos_ds.data.batches import Batch
from mythos_ds.data.held_out import held_out_batches
from mythos_ds.data.tokenizer_files import has_tokenizer
from mythos_ds.errors import DataError
from mythos_ds.weights.model_folder import model_of, read_metadata
from mythos_ds.weights.reader import TensorSource

ROWS = 4
BATCHES = 8
_SEQ_LEN = 256


def evaluated_loops(config: ModelConfig) -> list[int]:
    """1, the mean and the largest loop count of training: an error of the weights is met again in every loop."""
    return sorted({1, config.mean_recurrence, config.max_loops})


def held_out_text(folder: Path, config: ModelConfig, data_dir: Path) -> list[Batch]:
    """Batches {tokens, targets, positions} int64 [4, seq] of the built-in corpus's held-out part, in the model's own
    tokenizer. Raises DataError where the folder has none."""
    if not has_tokenizer(folder):
        raise DataError(f"{folder}: has no tokenizer; the text of --evaluate needs it")
    seq_len = read_metadata(folder).get("seq_len", _SEQ_LEN)
    return held_out_batches(
        data_dir, folder, rows=ROWS, batches=BATCHES, seq_len=seq_len, vocab_size=config.vocab_size
    )[0]


def losses(source: TensorSource, config: ModelConfig, batches: Sequence[Batch], loops: Sequence[int]) -> list[float]:
    """Mean loss (nats per token) at each of `loops` of the whole model that `source` gives, computed in fp32."""
    model = model_of(source, config)
    with torch.inference_mode():
        values = [
            [float(model(b["tokens"], n_loops=n, positions=b["positions"], targets=b["targets"])) for b in batches]
            for n in loops
        ]
    return [math.fsum(own) / len(own) for own in values]


def comparison(loops: Sequence[int], before: Sequence[float], after: Sequence[float]) -> list[dict[str, float]]:
    """A row for each loop count: perplexities, and by which part the second is larger."""
    return [
        {"loops": n, "before": math.exp(old), "after": math.exp(new), "change": math.exp(new - old) - 1.0}
        for n, old, new in zip(loops, before, after, strict=True)
    ]
