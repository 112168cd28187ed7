"""The built-in corpus as a dataset: text, tokenizer and token files in one folder, made once."""

import os
from dataclasses import dataclass
from pathlib import Path

from mythos_ds.data.corpus import DEFAULT_BYTES, build_corpus, write_corpus
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.tokenizer import train_tokenizer
from mythos_ds.errors import DataError
from mythos_ds.io import looked_for, published_directory
from mythos_ds.log import get_logger

VOCABULARY = 4096
_MOST_WORKERS = 4
_BYTES_PER_WORKER = 5_000_000

_logger = get_logger(__name__)


@dataclass(frozen=True)
class BuiltinData:
    """Where the built-in dataset lies."""

    prefix: Path
    tokenizer: Path

    @classmethod
    def under(cls, data_dir: Path) -> "BuiltinData":
        """The paths below `data_dir`, whether they exist or not."""
        folder = data_dir / "builtin"
        return cls(folder / "tokens", folder / "tokenizer.model")

    @property
    def folder(self) -> Path:
        """The folder, which exists only when everything in it is complete."""
        return self.prefix.parent


def prepare_builtin(data_dir: Path, *, max_bytes: int = DEFAULT_BYTES) -> BuiltinData:
    """Build corpus, tokenizer and token files under `data_dir`, unless they are there already.

    The folder appears by one rename; processes that start together build the same bytes and one of them wins.
    Data that exist are kept, also those of another interpreter, so that a run goes on with the text it began
    with.
    """
    data = BuiltinData.under(data_dir)
    if data.folder.is_dir():
        return data
    _logger.info("building the corpus from the Python installation in %s (once, about half a minute)", data.folder)
    with published_directory(data.folder) as work:
        documents = build_corpus(max_bytes=max_bytes)
        texts = [document.text for document in documents]
        write_corpus(documents, work / "corpus.jsonl")
        train_tokenizer(texts, work / data.tokenizer.name, vocab_size=VOCABULARY)
        info = prepare_dataset(
            texts,
            tokenizer_path=work / data.tokenizer.name,
            prefix=work / data.prefix.name,
            workers=min(_MOST_WORKERS, os.cpu_count() or 1, 1 + max_bytes // _BYTES_PER_WORKER),
            shuffle_seed=None,  # shuffled already, with each text beside its comments
            sources=("builtin",),
        )
    _logger.info("corpus: %d documents, %d tokens", info.documents, info.tokens)
    return data


def existing_builtin(data_dir: Path) -> BuiltinData:
    """The built-in dataset. Raises DataError when it was not built."""
    data = BuiltinData.under(data_dir)
    if not data.folder.is_dir():
        command = f"mythos-ds build-corpus --data-dir {data_dir}"
        raise DataError(f"no built-in corpus in {looked_for(data_dir)}; make it with: {command}", code="MDS410")
    return data
