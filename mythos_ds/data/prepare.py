"""Text to an indexed dataset: tokens by several processes, documents shuffled, files published together."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_ds.data.dataset_info import DatasetInfo, dataset_files, write_info
from mythos_ds.data.megatron import TokenWriter
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_export import check_exportable
from mythos_ds.errors import DataError
from mythos_ds.io import partial_path, sync

ProgressCallback = Callable[[int, int, int], None]
"""Called with documents, tokens and text bytes done so far."""

_BATCH_CHARACTERS = 500_000
_BATCH_DOCUMENTS = 1000
_TRIED_DOCUMENTS = 100
_TOKEN_DTYPE = np.int32


@dataclass(frozen=True)
class _Encoded:
    """Tokens of some documents one after the other, each with its end-of-document id."""

    tokens: NDArray[Any]
    lengths: list[int]
    text_bytes: int
    skipped: int


@dataclass
class _Totals:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0

    def add(self, batch: _Encoded) -> None:
        self.documents += len(batch.lengths)
        self.tokens += len(batch.tokens)
        self.text_bytes += batch.text_bytes
        self.skipped += batch.skipped


def prepare_dataset(
    documents: Iterable[str],
    *,
    tokenizer_path: Path,
    prefix: Path,
    workers: int = 1,
    shuffle_seed: int | None = 0,
    overwrite: bool = False,
    sources: Sequence[str] = (),
    on_progress: ProgressCallback | None = None,
) -> DatasetInfo:
    """Tokenise `documents` and write `prefix`.bin, .idx and .json; returns what the .json says.

    The end-of-document id follows every document; empty documents are left out. shuffle_seed: documents are
    written in an order drawn from it, because train and validation are later cut at fixed places of that
    order; None keeps the order of the input. workers: processes; the result does not depend on it. Needs
    about three times the space of the .bin while it runs, all of it beside the output. A process that dies on
    the way leaves a hidden `.partial` folder and nothing at the final names. Raises DataError when the output
    exists and `overwrite` is not set, or when there is no text.
    """
    tokenizer = Tokenizer.load(tokenizer_path)
    first, documents = _first_documents(documents)
    check_exportable(tokenizer, first)
    existing = [path for path in dataset_files(prefix) if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]} exists; give --overwrite to replace it, or another --output")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    work = partial_path(prefix)
    work.mkdir()
    try:
        totals, lengths = _encode_to_file(documents, tokenizer_path, workers, work / "raw", on_progress)
        if not totals.documents:
            raise DataError(f"no text to prepare: {totals.skipped} documents read, all empty")
        content = _write_in_order(work, lengths, shuffle_seed, tokenizer.vocab_size)
        bin_path, idx_path, _ = dataset_files(work / "data")
        info = DatasetInfo(
            documents=totals.documents,
            tokens=totals.tokens,
            skipped_documents=totals.skipped,
            text_bytes=totals.text_bytes,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256,
            content_sha256=content,
            shuffle_seed=shuffle_seed,
            sources=tuple(sources),
            bin_bytes=bin_path.stat().st_size,
            idx_bytes=idx_path.stat().st_size,
        )
        _publish(work, prefix, info)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return info


def _encode_to_file(
    documents: Iterable[str],
    tokenizer_path: Path,
    workers: int,
    path: Path,
    on_progress: ProgressCallback | None,
) -> tuple[_Totals, NDArray[np.int64]]:
    """Append all tokens to `path` in input order; returns totals and the documents' lengths."""
    totals, lengths = _Totals(), [np.zeros(0, dtype=np.int64)]
    batches = _batches(documents)
    encoded = (
        _encode_parallel(batches, tokenizer_path, workers) if workers > 1 else _encode_here(batches, tokenizer_path)
    )
    with path.open("wb") as file:
        for batch in encoded:
            file.write(batch.tokens.tobytes())
            lengths.append(np.array(batch.lengths, dtype=np.int64))
            totals.add(batch)
            if on_progress:
                on_progress(totals.documents, totals.tokens, totals.text_bytes)
    return totals, np.concatenate(lengths)


def _first_documents(documents: Iterable[str]) -> tuple[list[str], Iterator[str]]:
    """Some documents of the beginning, and all of them."""
    rest = iter(documents)
    first = list(islice(rest, _TRIED_DOCUMENTS))
    return first, chain(first, rest)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_here(batches: Iterable[list[str]], tokenizer_path: Path) -> Iterator[_Encoded]:
    encoder = _Encoder(str(tokenizer_path))
    return map(encoder.encode, batches)


def _encode_parallel(batches: Iterable[list[str]], tokenizer_path: Path, workers: int) -> Iterator[_Encoded]:
    """In input order, with a bounded number of batches in memory."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_Encoder.start, initargs=(str(tokenizer_path),))
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_Encoder.encode_started, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Encoder:
    """Encodes batches; `started` is the one of a worker process."""

    started: "_Encoder"

    def __init__(self, tokenizer_path: str):
        self.tokenizer = Tokenizer.load(tokenizer_path)

    @classmethod
    def start(cls, tokenizer_path: str) -> None:
        """Initialise a worker process, which ends with its parent even when that is killed."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads, beside those of the other workers
        cls.started = cls(tokenizer_path)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        threading.Thread(target=_exit_with_parent, daemon=True).start()

    @classmethod
    def encode_started(cls, documents: list[str]) -> _Encoded:
        """`encode` in a worker process."""
        return cls.started.encode(documents)

    def encode(self, documents: list[str]) -> _Encoded:
        """Tokens of the documents that hold more than white space."""
        ids: list[int] = []
        lengths: list[int] = []
        text_bytes = 0
        full = [document for document in documents if document.strip()]
        for document, encoded in zip(full, self.tokenizer.encode_all(full), strict=True):
            start = len(ids)
            ids += encoded
            ids.append(self.tokenizer.eos_id)
            lengths.append(len(ids) - start)
            text_bytes += len(document.encode("utf-8", "replace"))
        return _Encoded(np.array(ids, dtype=_TOKEN_DTYPE), lengths, text_bytes, len(documents) - len(lengths))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_in_order(work: Path, lengths: NDArray[np.int64], shuffle_seed: int | None, vocab_size: int) -> str:
    """Write the documents to work/data.bin and .idx in their final order; returns their digest."""
    tokens = np.memmap(work / "raw", dtype=_TOKEN_DTYPE, mode="r")
    starts = np.cumsum(lengths) - lengths
    order = np.arange(len(lengths))
    if shuffle_seed is not None:
        order = np.random.Generator(np.random.Philox(shuffle_seed)).permutation(order)
    writer = TokenWriter(work / "data", vocab_size)
    digest = hashlib.sha256()
    for number in order:
        document = tokens[starts[number] : starts[number] + lengths[number]].astype(writer.dtype)
        writer.add(document)
        digest.update(document.tobytes())
    writer.close()
    digest.update(lengths[order].tobytes())
    return digest.hexdigest()


def _publish(work: Path, prefix: Path, info: DatasetInfo) -> None:
    """Move the pair to its final names; the sidecar, which makes it count, goes last."""
    targets = dataset_files(prefix)
    targets[2].unlink(missing_ok=True)
    for source, target in zip(dataset_files(work / "data")[:2], targets[:2], strict=True):
        sync(source)
        source.replace(target)
    write_info(prefix, info)
    sync(prefix.parent)
