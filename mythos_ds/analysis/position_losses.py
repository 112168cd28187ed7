"""Held-out loss by position in a document: whether a model reads sequences as long as those it is given."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mythos_ds.analysis.loop_losses import DEFAULT_SEQUENCES, given_text, paired, token_losses
from mythos_ds.config.schema import RunConfig
from mythos_ds.data.batches import Batch
from mythos_ds.data.builtin import prepare_builtin
from mythos_ds.data.datasets import check_vocabulary, data_sources
from mythos_ds.data.inspection import DatasetView
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.validation import held_out_documents
from mythos_ds.errors import ConfigError, DataError, OptionError
from mythos_ds.model.mythos import MythosModel

SHORTEST = 16
_MOST = 1 << 20
_NEAR = 1
"""The part that the others are compared with: far enough in for a context, near enough for any model."""


def long_documents(config: RunConfig, length: int, asked: int | None = None) -> list[Batch]:
    """The first `length` tokens of `asked` held-out documents that are longer than that (else of as many as
    `held_out_sequences` takes), each a batch {tokens, targets, positions} int64 [1, length]; of more those that lie
    evenly apart. Raises ConfigError for fewer than 2, and where there are not so many, DataError for conversations, or
    data that is damaged or of another tokenizer."""
    if not SHORTEST <= length <= _MOST:
        nearest = min(max(length, SHORTEST), _MOST)
        raise OptionError(f"--by-position: given {length}; allowed: {SHORTEST} to {_MOST:,} tokens; nearest: {nearest}")
    if not config.data.validates:
        raise ConfigError(
            "data.validation: the run has no held-out text; give some: data.validation=PREFIX", code="MDS418"
        )
    if config.data.corpus == "builtin":
        prepare_builtin(Path(config.data.data_dir))
    tokenizer, vocab_size = Tokenizer.load(data_sources(config.data)[1]), config.model.vocab_size
    views = [(DatasetView(prefix), numbers) for prefix, numbers in held_out_documents(config.data)]
    for view, _ in views:
        if view.info.is_chat:
            raise DataError(
                f"--by-position: {view.prefix} holds conversations, of which only answers count; allowed: text",
                code="MDS120",
            )
        check_vocabulary(view.prefix, view.info, tokenizer, vocab_size)
    found = [(view, number) for view, numbers in views for number in numbers if view.lengths[number] > length]
    count = min(DEFAULT_SEQUENCES, len(found)) if asked is None else asked
    if not 2 <= count <= len(found):
        raise OptionError(
            f"--sequences: {given_text(asked)}; the held-out text has {len(found)} documents of more than {length} "
            f"tokens; allowed: 2 to that many, or more text by data.validation"
        )
    chosen = [found[place * len(found) // count] for place in range(count)]
    positions = torch.arange(length)[None]
    batches = []
    for view, number in chosen:
        ids = torch.from_numpy(view.document(number)[: length + 1].astype(np.int64))[None]
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise DataError(
                f"{view.prefix}: document {number} holds ids outside of 0 .. {vocab_size - 1}; the files are damaged: "
                "mythos-ds verify PREFIX --full names the place"
            )
        batches.append({"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions})
    return batches


def position_parts(length: int) -> list[tuple[int, int]]:
    """The parts of a document that are told apart: its first eighth, and what doubles from there."""
    bounds = [0, length // 8, length // 4, length // 2, length]
    return list(pairwise(bounds))


def position_losses(
    model: MythosModel,
    batches: Sequence[Batch],
    loops: Sequence[int],
    progress: Callable[[int], object] = lambda done: None,
) -> dict[int, list[list[float]]]:
    """The mean loss (nats per token) of each part of `position_parts` in each document, by loop count. Raises
    ConfigError, see `token_losses`."""
    parts = position_parts(batches[0]["tokens"].shape[1])
    found: dict[int, list[list[float]]] = {count: [] for count in sorted(set(loops))}
    for count, losses in token_losses(model, batches, loops, progress):
        found[count] += [[float(row[start:end].mean()) for start, end in parts] for row in losses]
    return found


def position_table(losses: Mapping[int, Sequence[Sequence[float]]], length: int) -> list[list[str]]:
    """Rows of a table: positions, and for each loop count the loss there, and that less the one of the second part."""
    rows = [["positions", *(text for n in losses for text in (f"{n} loops", "less the second part"))]]
    parts = position_parts(length)
    for index, (start, end) in enumerate(parts):
        row = [f"{start:,} - {end - 1:,}"]
        for own in losses.values():
            here = [document[index] for document in own]
            mean, error = paired(here, [document[_NEAR] for document in own])
            row += [f"{math.fsum(here) / len(here):.4f}", "" if index == _NEAR else f"{mean:+.4f} ± {error:.4f}"]
        rows.append(row)
    return rows


def positions_as_json(losses: Mapping[int, Sequence[Sequence[float]]], length: int) -> dict[str, Any]:
    """What a file keeps of an evaluation by position."""
    return {"parts": position_parts(length), "documents": {str(count): list(own) for count, own in losses.items()}}
