"""Whole conversations packed into samples of one length: none is cut in two, what is left over is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_ds.config.schema import IGNORED_LABEL
from mythos_ds.data.dataset_info import DatasetInfo, documents_of
from mythos_ds.data.index_files import load_array
from mythos_ds.data.megatron import PackingPlan, Part
from mythos_ds.data.token_files import open_ids, open_lengths, open_mask
from mythos_ds.errors import DamagedIndexError, DataError
from mythos_ds.io import read_json, write_json


@dataclass(frozen=True)
class PackingReport:
    """What packing gave, over one pass through the conversations.

    Attributes:
        conversations: those that are used.
        samples: sequences that hold them.
        used: share of their positions that is no padding.
        cut: conversations whose end is left out, being longer than a sequence.
        left_out: those of which nothing would be left to learn.
    """

    conversations: int
    samples: int
    used: float
    cut: int
    left_out: int

    @property
    def text(self) -> str:
        """In words."""
        longer = f", {self.cut:,} longer ones cut at their end" if self.cut else ""
        longer += f", {self.left_out:,} left out: longer, and no answer in what would be left" if self.left_out else ""
        return (
            f"{self.conversations:,} conversations in {self.samples:,} sequences, {self.used:.1%} of which is no "
            f"padding{longer}"
        )


@dataclass(frozen=True)
class _Usable:
    """Conversations of one part, and how many positions each takes: one for each token but the last, which predicts
    nothing."""

    documents: NDArray[np.int64]
    sizes: NDArray[np.int64]
    cut: int
    left_out: int


class ConversationSamples:
    """Samples {tokens, targets, positions} int64 [seq] and counted, the number of targets that count: of the others the
    target is -100. Sample i is decided by i alone, whatever the number of samples.

    Each pass takes every conversation once, in an order of its own.
    """

    def __init__(self, source: "ConversationSource", documents: NDArray[Any], starts: NDArray[Any]):
        self._source, self._documents, self._starts = source, documents, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        numbers = self._documents[self._starts[index] : self._starts[index + 1]]
        return self._source.sample([int(number) for number in numbers])


class ConversationSource:
    """The conversations of a prepared dataset, and their packing.

    number: the dataset's among those of the part, of which one may be there twice. masked: the loss counts what the
    assistant writes; else every token of a conversation.
    """

    def __init__(
        self, prefix: Path, info: DatasetInfo, plan: PackingPlan, *, number: int, masked: bool, document_mask: bool
    ):
        self._prefix, self._info, self._plan, self._number = prefix, info, plan, number
        self._masked, self._document_mask = masked, document_mask
        self._tokens, self._lengths = open_ids(prefix, info), open_lengths(prefix)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._mask = open_mask(prefix, info)

    def build(self, part: Part, samples: int, cache: Path) -> None:
        """Write the index of so many samples of one part. Raises DataError where it has no conversation."""
        usable = self._usable(part)
        chosen, sizes, made = list[NDArray[np.int64]](), list[NDArray[np.int64]](), 0
        for epoch in count():
            if made >= samples:
                break
            bins = self._packed(usable, epoch)
            if epoch == 0:
                write_json(cache / self._name(part, "packing.json"), asdict(self._report(usable, bins)))
            for numbers in bins[: samples - made]:
                chosen.append(numbers)
            sizes.append(np.array([len(numbers) for numbers in bins[: samples - made]], dtype=np.int64))
            made += len(bins)
        np.save(cache / self._name(part, "conversations.npy"), np.concatenate(chosen))
        np.save(cache / self._name(part, "samples.npy"), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))

    def open(self, part: Part, cache: Path) -> ConversationSamples:
        """The samples of one part, from their index."""
        return ConversationSamples(self, *self._index(part, cache))

    def check(self, part: Part, cache: Path) -> None:
        """Raises DataError where the index points outside of the part, or gives a sample more than it can hold."""
        documents, starts = self._index(part, cache)
        usable = self._usable(part)
        sizes = np.zeros(len(self._lengths), dtype=np.int64)
        sizes[usable.documents] = usable.sizes
        sound = bool(starts[0] == 0 and starts[-1] == len(documents) and (np.diff(starts) > 0).all())
        sound = sound and int(documents.min()) >= 0 and int(documents.max()) < len(sizes)
        if sound:
            taken = sizes[documents]
            sound = bool((taken > 0).all() and (np.add.reduceat(taken, starts[:-1]) <= self._plan.seq_len).all())
        if not sound:
            raise DamagedIndexError(
                f"index {cache} is damaged: {self._name(part, '*.npy')} points outside of the conversations; remove "
                "the folder to have it made anew"
            )

    def report(self, part: Part, cache: Path) -> PackingReport:
        """What the index of one part gave."""
        made: PackingReport = read_json(cache / self._name(part, "packing.json"), PackingReport, DataError)
        return made

    def sample(self, documents: Sequence[int]) -> dict[str, NDArray[np.int64]]:
        """One sample of some conversations, one after the other."""
        length = self._plan.seq_len
        tokens = np.full(length, self._plan.pad_id if self._plan.pad_id >= 0 else self._plan.eos_id, dtype=np.int64)
        targets, positions = np.full(length, IGNORED_LABEL, dtype=np.int64), np.zeros(length, dtype=np.int64)
        place = 0
        for number in documents:
            begin = int(self._starts[number])
            ids = self._tokens[begin : begin + min(int(self._lengths[number]), length + 1)].astype(np.int64)
            end = place + len(ids) - 1
            tokens[place:end], positions[place:end] = ids[:-1], np.arange(len(ids) - 1)
            counts = (
                self._mask[begin + 1 : begin + len(ids)] == 1 if self._masked else np.ones(len(ids) - 1, dtype=bool)
            )
            targets[place:end] = np.where(counts, ids[1:], IGNORED_LABEL)
            place = end
        positions[place:] = np.arange(length - place)
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": positions if self._document_mask else np.arange(length, dtype=np.int64),
            "counted": np.array((targets != IGNORED_LABEL).sum(), dtype=np.int64),
        }

    def _name(self, part: str, ending: str) -> str:
        return f"{part}-{self._number}-{self._info.content_sha256[:20]}-{ending}"

    def _index(self, part: Part, cache: Path) -> tuple[NDArray[Any], NDArray[Any]]:
        names = (self._name(part, ending) for ending in ("conversations.npy", "samples.npy"))
        documents, starts = (load_array(cache / name, 1) for name in names)
        if len(starts) < 2:
            raise DamagedIndexError(
                f"index {cache} is damaged: no sample in it; remove the folder to have it made anew"
            )
        return documents, starts

    def _usable(self, part: Part) -> _Usable:
        documents = np.array(documents_of(self._plan.split, part, len(self._lengths)), dtype=np.int64)
        sizes = self._lengths[documents] - 1
        longer = sizes > self._plan.seq_len
        kept = sizes > 0
        if self._masked:
            for place in np.flatnonzero(longer):
                begin = int(self._starts[documents[place]])
                kept[place] = bool(self._mask[begin + 1 : begin + self._plan.seq_len + 1].any())
        if not kept.any():
            raise DataError(
                f"{self._prefix}: data.split {list(self._plan.split)} leaves no {part} conversation of its "
                f"{len(self._lengths)} with an answer within training.seq_len {self._plan.seq_len}",
                code="MDS417",
            )
        cut = int((longer & kept).sum())
        return _Usable(documents[kept], sizes[kept].clip(max=self._plan.seq_len), cut, int((~kept).sum()))

    def _packed(self, usable: _Usable, epoch: int) -> list[NDArray[np.int64]]:
        """The conversations of each sample of a pass."""
        generator = np.random.Generator(np.random.Philox(key=[self._plan.seed, epoch]))
        order = generator.permutation(len(usable.documents))
        bins = best_fit(usable.sizes[order], self._plan.seq_len)
        shuffled = [order[bins[place]] for place in generator.permutation(len(bins))]
        return [usable.documents[generator.permutation(numbers)] for numbers in shuffled]

    def _report(self, usable: _Usable, bins: list[NDArray[np.int64]]) -> PackingReport:
        used = float(usable.sizes.sum()) / (len(bins) * self._plan.seq_len)
        return PackingReport(len(usable.documents), len(bins), used, usable.cut, usable.left_out)


def best_fit(sizes: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Places of `sizes` in bins of `capacity`, longest first, each into the fullest bin that has room (best-fit
    decreasing, Johnson 1974); those of one size in the order given."""
    bins, room = list[list[int]](), dict[int, list[int]]()
    rooms = list[int]()  # those of `room` that are not empty, sorted
    for place in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[place])
        found = bisect_left(rooms, size)
        if found == len(rooms):
            bins.append([])
            left, number = capacity, len(bins) - 1
        else:
            left = rooms[found]
            number = room[left].pop()
            if not room[left]:
                rooms.pop(found)
        bins[number].append(place)
        left -= size
        if left:
            if not room.setdefault(left, []):
                insort(rooms, left)
            room[left].append(number)
    return [np.array(numbers, dtype=np.int64) for numbers in bins]


def usable_tokens(prefix: Path, documents: range, seq_len: int) -> int:
    """Positions that some conversations fill, none of them more than a sequence."""
    lengths = open_lengths(prefix)[documents.start : documents.stop]
    return int((lengths - 1).clip(0, seq_len).sum())
