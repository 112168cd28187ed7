"""Text, or conversations, to an indexed dataset: tokens by several processes, documents shuffled, files published
together."""

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_ds.data.chat import ChatTemplate
from mythos_ds.data.dataset_info import DatasetInfo, dataset_files, mask_file, read_info, write_info
from mythos_ds.data.encoding import Batch, Encoded, EncoderPool, Result, encoder_pool, split_answers
from mythos_ds.data.parts import Part, PartStore, unfinished_folder
from mythos_ds.data.rows import LONG_CHARACTERS, BadRow, BadRows, Conversation, LongText, Row, long_or_whole
from mythos_ds.data.text_cuts import PIECE_CHARACTERS, in_pieces
from mythos_ds.data.token_files import MaskWriter, TokenWriter
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_export import check_exportable
from mythos_ds.errors import DataError
from mythos_ds.io import read_json, remove_at_once, remove_partials, sync, write_json
from mythos_ds.log import get_logger
from mythos_ds.output_lock import locked_output

ProgressCallback = Callable[[int, int, int], None]
"""Called with documents, tokens and text bytes done so far."""

_BATCH_DOCUMENTS = 5000
_BATCHES_AHEAD = 32
"""Batches that wait for processes, so that these have work while a whole part is read."""
_PART_CHARACTERS, _FEW_PARTS = 2_000_000, 64
"""Characters of each of the first parts; of those after them, so that they do not become too many, eight times more."""
_BORDER = 64
_BLOCK_TOKENS = 1 << 20
_READ_TOKENS, _MAPPED_TOKENS = 1 << 14, 1 << 24
"""What the system maps around a place that is read, 64 KiB; what is mapped before it is given back, 64 to 128 MiB."""
_SMALL_TOKENS = 3 << 24
"""In files of fewer nothing is given back."""
_PUBLISHING = "publishing.json"
_MOST_TOKENS = np.iinfo(np.int32).max  # the index counts a document's tokens in four bytes
_TRIED_DOCUMENTS, _TRIED_CHARACTERS = 100, 2_000_000

_logger = get_logger(__name__)


@dataclass(frozen=True)
class _Work:
    """The batches of one part; without any, the mark that the long document before it is none."""

    batches: list[Batch]


@dataclass
class _Running:
    """A part that is being encoded: its batches, what is not there yet, and what is."""

    key: str
    batches: list[Batch]
    known: Part | None
    waiting: deque[Result] = field(default_factory=deque)
    results: list[Encoded] = field(default_factory=list)
    submitted: bool = False


@dataclass
class _Documents:
    """Where the tokens of each document lie: in one stretch, those of a long one in several."""

    parts: list[Part] = field(default_factory=list)

    def take(self, part: Part) -> None:
        """Add the documents, or the piece of one, that a part holds."""
        self.parts.append(part)

    @property
    def count(self) -> int:
        """How many documents there are."""
        return sum(part.lengths for part in self.parts if part.ends)

    def drop_unfinished(self) -> None:
        """Take away the pieces of a document that turned out to be none."""
        while self.parts and not self.parts[-1].ends:
            self.parts.pop()

    def stretches(self, store: PartStore) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int, list[slice]]]:
        """Start and length of each document, and all stretches of those that have several."""
        starts, lengths = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        several: dict[int, list[slice]] = {}
        count = 0
        for part in self.parts:
            found = store.lengths(part)
            begins = part.at + np.cumsum(found) - found
            if not (part.starts and part.ends):
                if part.starts:
                    several[count] = []
                several[count].append(slice(part.at, part.at + part.tokens))
                if not part.ends:
                    continue
                found = np.array([sum(each.stop - each.start for each in several[count])], dtype=np.int64)
                begins = begins[:1]
            starts.append(begins)
            lengths.append(found)
            count += len(found)
        return np.concatenate(starts), np.concatenate(lengths), several


def prepare_dataset(
    documents: Iterable[Row],
    *,
    tokenizer_path: Path,
    prefix: Path,
    workers: int = 1,
    shuffle_seed: int | None = 0,
    overwrite: bool = False,
    sources: Sequence[str] = (),
    inputs: Sequence[Path] = (),
    on_progress: ProgressCallback | None = None,
    skip_bad_rows: bool = False,
    break_lock: bool = False,
    chat: bool = False,
    chat_template: str | None = None,
) -> DatasetInfo:
    """Tokenise `documents` and write `prefix`.bin, .idx and .json; returns what the .json says.

    The end-of-document id follows every document; empty documents are left out. shuffle_seed: documents are
    written in an order drawn from it, because train and validation are later cut at fixed places of that
    order; None keeps the order of the input. workers: processes; the result does not depend on it. Needs
    about three times the space of the .bin while it runs, all of it beside the output. inputs: files that the
    documents come from, which are never overwritten.

    skip_bad_rows: leave rows without a text out and count them; else they are told together, and nothing is
    published. A preparation that ends on the way leaves its finished parts in a hidden folder, `.NAME.unfinished`,
    and nothing at the final names; the next one into the same output takes over those whose text is the same.

    chat: `documents` are conversations. They are written as the chat template renders them, without an
    end-of-document id, and beside them `prefix`.mask, which says of each token whether the assistant is to write it.
    chat_template: Jinja; that of the files beside the tokenizer where None.

    Raises DataError when the output exists and `overwrite` is not set, when there is no text, or for bad rows, and
    OutputError while another process writes the same output.
    """
    tokenizer = Tokenizer.load(tokenizer_path)
    template = ChatTemplate(tokenizer, chat_template) if chat else None
    _check_names(prefix, [*inputs, tokenizer.path])
    with locked_output(prefix, "prepare-data", folder=False, break_lock=break_lock):
        remove_partials(prefix)
        overwrite = overwrite or _half_published(prefix)
        _refuse_existing(prefix, overwrite, chat=chat)
        first, rows = _first_rows(documents)
        check_exportable(tokenizer, [_text_of(row) for row in first])
        store = PartStore(prefix, tokenizer.sha256, _text_or_none(template))
        if store.found:
            _logger.info("going on from %d finished parts in %s", store.found, store.folder)
        try:
            bad = BadRows(skip=skip_bad_rows)
            with encoder_pool(tokenizer_path, workers, _text_or_none(template)) as pool:
                found = _Encoding(pool, store, bad, on_progress).run(_works(rows, tokenizer, bad))
            bad.check(store.folder if store.is_of_use else None)
            if not found.count:
                raise _nothing_found(found, bad, sources, chat=chat)
            info = _written(prefix, tokenizer, template, store, found, bad, shuffle_seed, sources)
            _publish(store.folder, prefix, info, overwrite=overwrite)
            store.remove()
        finally:
            store.keep_or_remove()
    return info


def _text_or_none(template: ChatTemplate | None) -> str | None:
    return None if template is None else template.text


def _nothing_found(found: _Documents, bad: BadRows, sources: Sequence[str], *, chat: bool) -> DataError:
    where = f"{', '.join(sources[:3])}: " if sources else ""
    if chat:
        return DataError(
            f"{where}no conversation to prepare: {bad.count} rows read, none of them is one", code="MDS427"
        )
    skipped = sum(part.skipped for part in found.parts)
    return DataError(f"{where}no text to prepare: {skipped} documents read, all empty", code="MDS427")


def _half_published(prefix: Path) -> bool:
    """Whether what stands at the output's names was put there by a preparation that ended before the last of them. What
    one left that ended just after it is removed."""
    mark = unfinished_folder(prefix) / _PUBLISHING
    targets = dataset_files(prefix)
    if not mark.is_file():
        return False
    if targets[2].exists():
        remove_at_once(mark.parent, prefix)
        return False
    sizes = read_json(mark, dict[str, int], DataError)
    there = [path for path in (*targets[:2], mask_file(prefix)) if path.suffix[1:] in sizes and path.exists()]
    return all(path.is_file() and path.stat().st_size == sizes.get(path.suffix[1:]) for path in there)


def _check_names(prefix: Path, sources: Iterable[Path]) -> None:
    """Raises DataError where there is no name for files, and where one of them is what the text is made from."""
    if prefix.name in ("", ".."):
        raise DataError(
            f"--output {str(prefix)!r} given, which names no file; allowed: a path such as data/docs", code="MDS120"
        )
    for target in (*dataset_files(prefix), mask_file(prefix)):
        for source in sources:
            with suppress(OSError, ValueError):  # what is not there is told by whoever reads it
                if target.samefile(source):
                    raise DataError(f"{target} would take the place of the input {source}; give another --output")


def _refuse_existing(prefix: Path, overwrite: bool, *, chat: bool) -> None:
    files = (*dataset_files(prefix), mask_file(prefix)) if chat else dataset_files(prefix)
    existing = [path for path in files if path.exists() or path.is_symlink()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]} exists; give --overwrite to replace it, or another --output", code="MDS601")


def _first_rows(documents: Iterable[Row]) -> tuple[list[Row], Iterator[Row]]:
    """Some rows of the beginning, and all of them."""
    rest = iter(documents)
    first: list[Row] = []
    size = 0
    for row in rest:
        first.append(row)
        size += len(_text_of(row))
        if len(first) == _TRIED_DOCUMENTS or size > _TRIED_CHARACTERS or isinstance(row, LongText):
            break
    return first, chain(first, rest)


def _text_of(row: Row) -> str:
    """The text of what is at hand whole; empty of what is not."""
    return row if isinstance(row, str) else row.text if isinstance(row, Conversation) else ""


@dataclass
class _Gathered:
    """Texts of the batch and the part that are being gathered."""

    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    size: int = 0
    batches: list[Batch] = field(default_factory=list)
    part_size: int = 0
    parts: int = 0

    def add(self, row: str | Conversation) -> None:
        """Add a text."""
        text = _text_of(row)
        self.texts.append(text)
        if isinstance(row, Conversation):
            self.places.append(row.where)
        self.size += len(text)
        self.part_size += len(text)

    @property
    def part_ends(self) -> bool:
        """Whether the part ends with the text that was added last."""
        least = _PART_CHARACTERS * (1 if self.parts < _FEW_PARTS else 8)
        return self.part_size >= least and (self.part_size >= 2 * least or _is_border(self.texts[-1]))

    @property
    def batch_ends(self) -> bool:
        """Whether the batch is full."""
        return self.size >= PIECE_CHARACTERS or len(self.texts) >= _BATCH_DOCUMENTS

    def end_batch(self) -> None:
        """Put the texts into a batch."""
        if self.texts:
            self.batches.append(Batch(self.texts, places=tuple(self.places)))
            self.texts, self.places, self.size = [], [], 0

    def end_part(self) -> Iterator[_Work]:
        """The part, where there is anything in it."""
        self.end_batch()
        if self.batches:
            yield _Work(self.batches)
            self.batches, self.part_size, self.parts = [], 0, self.parts + 1


def _works(rows: Iterable[Row], tokenizer: Tokenizer, bad: BadRows) -> Iterator[_Work]:
    """Parts of the input. They end at documents that the text decides, so that a mended row changes one of them."""
    gathered = _Gathered()
    for row in rows:
        bad.documents += not isinstance(row, BadRow)
        if isinstance(row, BadRow):
            bad.add(row)
        elif isinstance(row := _in_pieces(row), LongText):
            yield from gathered.end_part()
            yield from _long_works(row, tokenizer, bad)
        else:
            gathered.add(row)
            if gathered.part_ends:
                yield from gathered.end_part()
            elif gathered.batch_ends:
                gathered.end_batch()
        if bad.full:
            break
    yield from gathered.end_part()


def _in_pieces(row: str | LongText | Conversation) -> str | LongText | Conversation:
    """The row, in pieces where it is a long text."""
    if not isinstance(row, str) or len(row) <= LONG_CHARACTERS:
        return row
    return long_or_whole(row, f"a document that begins {row[:40]!r}")


def _is_border(text: str) -> bool:
    return zlib.crc32(text[-64:].encode("utf-8", "replace")) % _BORDER == 0


def _long_works(row: LongText, tokenizer: Tokenizer, bad: BadRows) -> Iterator[_Work]:
    """A part for each piece of a long document."""
    before: str | None = None
    starts = True
    for piece in in_pieces(tokenizer, row.pieces, row.where):
        if isinstance(piece, BadRow):
            bad.add(piece)
            if not starts:
                yield _Work([])
            return
        if before is not None:
            yield _Work([Batch([before], starts, ends=False)])
            starts = False
        before = piece
    if before is not None:
        yield _Work([Batch([before], starts)])


class _Encoding:
    """Encodes what no finished part holds, in input order, with a bounded number of batches in memory."""

    def __init__(self, pool: EncoderPool, store: PartStore, bad: BadRows, on_progress: ProgressCallback | None):
        self._pool, self._store, self._bad, self._on_progress = pool, store, bad, on_progress
        self._queue: deque[_Running] = deque()
        self._outstanding = 0
        self._done = [0, 0, 0]
        self._found = _Documents()

    def run(self, works: Iterable[_Work]) -> _Documents:
        """Where the tokens of all documents lie."""
        ahead = max(2 * self._pool.workers, _BATCHES_AHEAD) if self._pool.workers > 1 else 0
        for work in works:
            key = self._store.key(work.batches)
            running = _Running(key, work.batches, self._store.known(key) if work.batches else None)
            self._queue.append(running)
            for batch in () if running.known else work.batches:
                running.waiting.append(self._pool.submit(batch))
                self._outstanding += 1
                self._settle(ahead)
            running.submitted = True
            self._settle(ahead)
        self._settle(0)
        return self._found

    def _settle(self, most: int) -> None:
        """Wait until at most so many batches are unfinished; keep the parts that are complete then."""
        for running in self._queue:
            while running.waiting and (self._outstanding > most or running.waiting[0].done()):
                encoded = running.waiting.popleft().result()
                self._outstanding -= 1
                running.results.append(encoded)
                ends = running.batches[0].starts and running.batches[-1].ends
                self._progress(len(encoded.lengths) if ends else 0, len(encoded.tokens), encoded.text_bytes)
        while self._queue and self._queue[0].submitted and not self._queue[0].waiting:
            self._keep(self._queue.popleft())

    def _keep(self, running: _Running) -> None:
        if running.known:
            whole = running.known.starts and running.known.ends
            self._progress(running.known.lengths if whole else 0, running.known.tokens, running.known.text_bytes)
            self._found.take(running.known)
        elif running.batches:
            for row in (row for encoded in running.results for row in encoded.refused):
                self._bad.add(row)
            self._found.take(self._store.add(running.key, running.batches, running.results))
        else:
            self._found.drop_unfinished()

    def _progress(self, *more: int) -> None:
        self._done = [done + each for done, each in zip(self._done, more, strict=True)]
        if self._on_progress:
            self._on_progress(*self._done)


def _written(
    prefix: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    store: PartStore,
    found: _Documents,
    bad: BadRows,
    shuffle_seed: int | None,
    sources: Sequence[str],
) -> DatasetInfo:
    """Write the documents to data.bin and .idx in the store's folder, in their final order; returns what they are."""
    starts, lengths, several = found.stretches(store)
    if lengths.max() > _MOST_TOKENS:
        raise DataError(f"a document of {lengths.max():,} tokens; allowed: {_MOST_TOKENS:,}: cut it into several")
    order = np.arange(len(lengths))
    if shuffle_seed is not None:
        order = np.random.Generator(np.random.Philox(shuffle_seed)).permutation(order)
    bin_path, idx_path, _ = dataset_files(store.folder / "data")
    writer = TokenWriter(store.folder / "data", tokenizer.vocab_size)
    answers = _Answers(store.folder / "data", template) if template is not None else None
    digest, mapped, whole = hashlib.sha256(), 0, store.tokens()
    for tokens, ended in _in_order(whole, order, starts, lengths, several):
        mapped += int(np.maximum(ended, _READ_TOKENS).sum()) if len(ended) else len(tokens)
        if answers is not None:
            tokens = answers.add(tokens, ended)
        digest.update(writer.add(tokens, ended))
        if mapped > _MAPPED_TOKENS and len(whole) > _SMALL_TOKENS:
            store.forget_read()
            mapped = 0
    writer.close()
    digest.update(lengths[order].tobytes())
    return DatasetInfo(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        skipped_documents=sum(part.skipped for part in found.parts),
        text_bytes=sum(part.text_bytes for part in found.parts),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        content_sha256=digest.hexdigest(),
        shuffle_seed=shuffle_seed,
        sources=tuple(sources),
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        bad_rows=bad.count,
        bad_row_examples=tuple(bad.examples),
        **({} if answers is None else answers.close()),
    )


class _Answers:
    """The .mask file of conversations, and the tokens that the assistant's turns end with."""

    def __init__(self, prefix: Path, template: ChatTemplate):
        self._writer, self._template = MaskWriter(prefix), template
        self._counted, self._ends = 0, set[int]()

    def add(self, stored: NDArray[np.int32], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """Write which tokens of some conversations, all whole or in blocks of one, count; returns the tokens."""
        tokens, flags = split_answers(stored)
        self._writer.add(flags)
        self._counted += int(flags.sum(dtype=np.int64))
        last = np.append(flags[1:] == 0, [False])[: len(flags)]
        if len(flags) and len(lengths):
            last[np.cumsum(lengths) - 1] = True
        self._note_ends(tokens, flags == 1, np.flatnonzero(last & (flags == 1)))
        return tokens

    def _note_ends(self, tokens: NDArray[Any], counts: NDArray[Any], places: NDArray[Any]) -> None:
        """Remember the template's own tokens that end turns at `places`, or are followed by white space there."""
        own, before = set(self._template.tokens.values()), np.where(counts[places - 1], tokens[places - 1], -1)
        for first, second in set(zip(before.tolist(), tokens[places].tolist(), strict=True)):
            if second in own:
                self._ends.add(second)
            elif first in own and not self._template.tokenizer.decode([second]).strip():
                self._ends.add(first)

    def close(self) -> dict[str, Any]:
        """End the file; what the .json says of it."""
        return {
            "mask_sha256": self._writer.close(),
            "counted_tokens": self._counted,
            "chat_template": self._template.text,
            "turn_ends": tuple(sorted(self._ends)),
        }


def _in_order(
    tokens: NDArray[np.int32],
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    several: dict[int, list[slice]],
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Tokens in the order of their documents, and the lengths of those that end with them: short documents together,
    long ones in blocks."""
    alone = lengths[order] > _BLOCK_TOKENS
    alone |= np.isin(order, list(several))
    full = np.diff(np.cumsum(lengths[order]) // _BLOCK_TOKENS) > 0
    full |= np.diff(np.cumsum(np.maximum(lengths[order], _READ_TOKENS)) // _MAPPED_TOKENS) > 0
    borders = np.flatnonzero(alone[1:] | alone[:-1] | full) + 1
    for first, last in pairwise([0, *borders.tolist(), len(order)]):
        numbers = order[first:last]
        if not alone[first]:
            sizes = lengths[numbers]
            begins = starts[numbers] - (np.cumsum(sizes) - sizes)
            yield tokens[np.repeat(begins, sizes) + np.arange(sizes.sum())], sizes
            continue
        [number] = numbers.tolist()
        for stretch in several.get(number) or [slice(starts[number], starts[number] + lengths[number])]:
            for start in range(stretch.start, stretch.stop, _BLOCK_TOKENS):
                yield tokens[start : min(start + _BLOCK_TOKENS, stretch.stop)], lengths[:0]
        yield tokens[:0], lengths[number : number + 1]


def _holds_conversations(prefix: Path) -> bool:
    """Whether the dataset that is to be replaced has a .mask file."""
    try:
        return read_info(prefix).is_chat
    except DataError:
        return False


def _publish(work: Path, prefix: Path, info: DatasetInfo, *, overwrite: bool) -> None:
    """Move the pair to its final names; the sidecar, which makes it count, goes last."""
    _refuse_existing(prefix, overwrite, chat=info.is_chat)  # made meanwhile by something that knows no lock
    targets = dataset_files(prefix)
    sizes = {"bin": info.bin_bytes, "idx": info.idx_bytes}
    pairs = list(zip(dataset_files(work / "data")[:2], targets[:2], strict=True))
    if info.is_chat:
        sizes["mask"] = info.tokens
        pairs.append((mask_file(work / "data"), mask_file(prefix)))
    write_json(work / _PUBLISHING, sizes)
    if not info.is_chat and _holds_conversations(prefix):
        mask_file(prefix).unlink(missing_ok=True)
    targets[2].unlink(missing_ok=True)
    for source, target in pairs:
        sync(source)
        source.replace(target)
    write_info(prefix, info)
    sync(prefix.parent)
