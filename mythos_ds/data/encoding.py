"""Batches of texts, or of conversations, to tokens, here or in worker processes."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mythos_ds.data.chat import ChatTemplate, TemplateFault
from mythos_ds.data.rows import BadRow
from mythos_ds.data.text_cuts import ids_of_piece
from mythos_ds.data.tokenizer import Tokenizer, well_formed
from mythos_ds.errors import DataError

TOKEN_DTYPE = np.int32


@dataclass(frozen=True)
class Batch:
    """Texts to encode: documents, one piece of a long document, or conversations.

    Attributes:
        starts: whether the first text begins its document.
        ends: whether the last one ends it.
        places: of conversations, where each is read from.
    """

    texts: list[str]
    starts: bool = True
    ends: bool = True
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """Tokens of some texts one after the other, those of a whole document with its end-of-document id. Of conversations
    the ids that the assistant is to write are stored as -1 - id (`split_answers`).

    Attributes:
        refused: conversations that the chat template does not take.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    text_bytes: int
    skipped: int
    refused: tuple[BadRow, ...] = ()


def split_answers(stored: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The ids of conversations, and 1 for each that the assistant is to write, else 0."""
    answers = stored < 0
    return np.where(answers, -1 - stored, stored), answers.astype(np.uint8)


class Encoder:
    """Encodes batches; `started` is the one of a worker process."""

    started: "Encoder"

    def __init__(self, tokenizer_path: str, chat_template: str | None = None):
        self.tokenizer = Tokenizer.load(tokenizer_path)
        self._chat = ChatTemplate(self.tokenizer, chat_template) if chat_template is not None else None

    @classmethod
    def start(cls, tokenizer_path: str, chat_template: str | None) -> None:
        """Initialise a worker process, which ends with its parent even when that is killed."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads, beside those of the other workers
        cls.started = cls(tokenizer_path, chat_template)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        threading.Thread(target=_exit_with_parent, daemon=True).start()

    @classmethod
    def encode_started(cls, batch: Batch) -> Encoded:
        """`encode` in a worker process."""
        return cls.started.encode(batch)

    def encode(self, batch: Batch) -> Encoded:
        """Tokens of the documents that hold more than white space, or of conversations."""
        if self._chat is not None:
            return _encoded_chats(self._chat, batch)
        eos = [self.tokenizer.eos_id]
        if not batch.starts or not batch.ends:
            [text] = batch.texts
            found = [ids_of_piece(self.tokenizer, text, starts=batch.starts) + (eos if batch.ends else [])]
            return _encoded(found, len(text.encode("utf-8", "replace")), 0)
        full = [text for text in batch.texts if text.strip()]
        found = [ids + eos for ids in self.tokenizer.encode_all(full)]
        text_bytes = sum(len(text.encode("utf-8", "replace")) for text in full)
        return _encoded(found, text_bytes, len(batch.texts) - len(full))


def _encoded_chats(template: ChatTemplate, batch: Batch) -> Encoded:
    found, refused, text_bytes = list[list[int]](), list[BadRow](), 0
    for text, where in zip(batch.texts, batch.places, strict=True):
        content = json.loads(well_formed(text))
        try:
            chat = template.encode_answers(content["messages"], tools=content.get("tools"))
        except TemplateFault:
            raise
        except DataError as error:
            refused.append(BadRow(where, "not a conversation for the chat template", str(error)))
            continue
        found.append([-1 - number if own else number for number, own in zip(chat.ids, chat.answers, strict=True)])
        text_bytes += sum(len(message["content"].encode("utf-8")) for message in content["messages"])
    return replace(_encoded(found, text_bytes, 0), refused=tuple(refused))


def _encoded(found: list[list[int]], text_bytes: int, skipped: int) -> Encoded:
    lengths = np.array([len(ids) for ids in found], dtype=np.int32)
    tokens = np.fromiter(chain.from_iterable(found), dtype=TOKEN_DTYPE, count=int(lengths.sum()))
    return Encoded(tokens, lengths, text_bytes, skipped)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Result(Protocol):
    """Tokens that are there, or will be."""

    def result(self) -> Encoded: ...

    def done(self) -> bool: ...


@dataclass(frozen=True)
class _Done:
    encoded: Encoded

    def result(self) -> Encoded:
        return self.encoded

    def done(self) -> bool:
        return True


class EncoderPool:
    """Encodes in `workers` processes, or, with one, at once in this process."""

    def __init__(self, tokenizer_path: Path, workers: int, chat_template: str | None = None):
        self.workers = workers
        self._here = Encoder(str(tokenizer_path), chat_template) if workers == 1 else None
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                workers, context, initializer=Encoder.start, initargs=(str(tokenizer_path), chat_template)
            )

    def submit(self, batch: Batch) -> Result:
        """Begin to encode a batch."""
        if self._pool is None:
            assert self._here is not None
            return _Done(self._here.encode(batch))
        future: Future[Encoded] = self._pool.submit(Encoder.encode_started, batch)
        return future

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def encoder_pool(tokenizer_path: Path, workers: int, chat_template: str | None = None) -> Iterator[EncoderPool]:
    """A pool for the block; with a chat template, of conversations. Raises DataError where memory runs out, here or for
    a process of it."""
    pool = None
    try:
        pool = EncoderPool(tokenizer_path, workers, chat_template)
        yield pool
    except (BrokenProcessPool, MemoryError) as error:
        killed = isinstance(error, BrokenProcessPool)
        who = "a process that tokenises was killed" if killed else "there was no more memory"
        fewer = f"give fewer --workers ({workers} given)" if workers > 1 else "give it more memory"
        raise DataError(
            f"{who}, most likely because memory ran out: {fewer}; finished parts are kept, the same command goes on "
            "from them",
            code="MDS426",
        ) from error
    finally:
        if pool is not None:
            pool.close()
