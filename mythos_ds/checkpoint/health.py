"""Whether a checkpoint's values are healthy, read a few rows at a time, and which part of the model each belongs to."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mythos_ds.checkpoint import random_state
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.errors import CheckpointError
from mythos_ds.weights.reader import TensorSource
from mythos_ds.weights.writer import row_pieces


def measure_tensor(source: TensorSource, name: str, report: Callable[[int], None]) -> dict[str, Any]:
    """Shape, norm, largest magnitude, and how many values are zero or not finite; `report` gets the
    bytes as they are read."""
    spec = source.specs()[name]
    squares, largest, zeros, odd, count = 0.0, 0.0, 0, 0, 0
    for rows in row_pieces(spec):
        values = source.read(name, rows)
        report(values.nbytes)
        values = values.double()
        finite = torch.isfinite(values)
        odd += int((~finite).sum())
        values = values[finite]
        count += values.numel()
        squares += float(values.square().sum())
        zeros += int((values == 0).sum())
        largest = max(largest, float(values.abs().max()) if values.numel() else 0.0)
    return {
        "shape": list(spec.shape),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "bytes": spec.nbytes,
        "rms": math.sqrt(squares / count) if count else 0.0,
        "largest": largest,
        "zeros": zeros,
        "not_finite": odd,
    }


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    for mark, part in (
        (".experts.", "routed experts"), (".shared_experts.", "shared experts"), (".router.", "routers"),
        ("embed.", "embedding"), ("lm_head.", "head"), ("prelude.", "prelude"), ("coda.", "coda"),
        ("recurrent.layers.", "recurrent layers"), ("recurrent.", "loop"), ("prelude_norm", "loop"),
    ):  # fmt: skip
        if mark in name and not (mark == ".experts." and ".shared_experts." in name):
            return part
    return "final norm"


def content_faults(tag: Path) -> list[str]:
    """What is wrong with the JSON of a checkpoint whose files are those that were written."""
    found = []
    checks: list[Callable[[], object]] = [partial(read_state, tag)]
    checks += [partial(random_state.read_states, path) for path in sorted(tag.glob("random_state_rank_*.json"))]
    for check in checks:
        try:
            check()
        except CheckpointError as error:
            found.append(str(error))
    return found
