"""The built-in corpus for a model that is looked at: held-out text (or text to train on) in the model's own tokens."""

import os
from itertools import islice
from pathlib import Path

from mythos_ds.config.schema import DataConfig, DatasetConfig
from mythos_ds.data.batches import Batch, BatchStream
from mythos_ds.data.builtin import BuiltinData, prepare_builtin
from mythos_ds.data.datasets import TokenDatasets, build_datasets, prepare_index_cache
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.readers import read_files
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_files import has_tokenizer
from mythos_ds.io import published_directory

_MOST_WORKERS = 4


def held_out_batches(
    data_dir: Path,
    tokenizer: Path,
    *,
    rows: int,
    batches: int,
    seq_len: int,
    vocab_size: int,
    seed: int = 0,
    training: bool = False,
) -> tuple[list[Batch], Tokenizer]:
    """Reads the first batches {tokens, targets, positions}, int64 [rows, seq_len], of held-out text, or of training
    text, and the tokenizer. For the other arguments see `open_text`."""
    count = batches * rows
    data = open_text(
        data_dir,
        tokenizer,
        seq_len=seq_len,
        train_samples=count if training else 0,
        valid_samples=0 if training else count,
        seed=seed,
        vocab_size=vocab_size,
    )
    source = data.train if training else data.valid
    stream = BatchStream(source, start_sample=0, micro_batch_size=rows, dp_rank=0, dp_size=1)
    return list(islice(stream, batches)), data.tokenizer


def open_text(
    data_dir: Path,
    tokenizer: Path,
    *,
    seq_len: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    vocab_size: int,
) -> TokenDatasets:
    """The built-in corpus for a model of its own tokenizer, or, where `tokenizer` names none, of the corpus's.

    Made in `data_dir` where it is missing; of a foreign tokenizer the tokens lie beside it. Raises DataError where the
    model's vocab_size is too small.
    """
    builtin = prepare_builtin(data_dir)
    data = DataConfig(corpus="builtin", data_dir=str(data_dir))
    if has_tokenizer(tokenizer) and Tokenizer.load(tokenizer).sha256 != Tokenizer.load(builtin.tokenizer).sha256:
        data = _tokenised_anew(builtin, tokenizer, data_dir)
    request = {"seq_len": seq_len, "train_samples": train_samples, "valid_samples": valid_samples, "seed": seed}
    prepare_index_cache(data, **request, vocab_size=vocab_size)
    return build_datasets(data, **request, vocab_size=vocab_size)


def _tokenised_anew(builtin: BuiltinData, tokenizer: Path, data_dir: Path) -> DataConfig:
    folder = data_dir / f"builtin-{Tokenizer.load(tokenizer).sha256[:12]}"
    if not folder.is_dir():
        with published_directory(folder) as work:
            prepare_dataset(
                read_files([builtin.folder / "corpus.jsonl"]),
                tokenizer_path=tokenizer,
                prefix=work / "tokens",
                workers=min(_MOST_WORKERS, os.cpu_count() or 1),
                shuffle_seed=None,  # shuffled already
                sources=("builtin",),
            )
    datasets = [DatasetConfig(prefix=str(folder / "tokens"))]
    return DataConfig(datasets=datasets, tokenizer=str(tokenizer), data_dir=str(data_dir))
