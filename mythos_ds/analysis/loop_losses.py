"""Held-out loss by loop count, sequence by sequence: what more loops bring is a difference on the same text."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.config.schema import IGNORED_LABEL, LOOPS, RunConfig
from mythos_ds.data.batches import Batch, BatchStream
from mythos_ds.data.datasets import build_datasets, prepare_index_cache
from mythos_ds.data.validation import held_out
from mythos_ds.errors import ConfigError, OptionError
from mythos_ds.log import get_logger
from mythos_ds.model.mythos import MythosModel

_logger = get_logger(__name__)

DEFAULT_SEQUENCES = 16
_ROWS = 2
_MOST_SEQUENCES = 1 << 20


def held_out_sequences(config: RunConfig, asked: int | None = None) -> list[Batch]:
    """The first sequences of a run's held-out text, the same for every seed of training, as batches {tokens, targets,
    positions} int64 [rows, seq]: `asked`, or else DEFAULT_SEQUENCES or all that there are. Raises ConfigError for fewer
    than 2, which have no spread, and where more are asked for: read twice, a sequence says nothing new of the spread.
    """
    count = DEFAULT_SEQUENCES if asked is None else asked
    if not 2 <= count <= _MOST_SEQUENCES:
        nearest = min(max(count, 2), _MOST_SEQUENCES)
        raise OptionError(
            f"--sequences: given {count}; allowed: at least 2, at most {_MOST_SEQUENCES}; nearest: {nearest}"
        )
    if not config.data.validates:
        raise ConfigError(
            "data.validation: the run has no held-out text; give some: data.validation=PREFIX", code="MDS418"
        )
    count += count % _ROWS
    length = {"seq_len": config.training.seq_len, "train_samples": 0, "valid_samples": count, "seed": 0}
    prepare_index_cache(config.data, **length, vocab_size=config.model.vocab_size)
    found = held_out(config.data, config.training, exact=True)
    there = (found.tokens - 1) // config.training.seq_len if found is not None else count
    if count > there >= _ROWS and asked is None:
        count = there - there % _ROWS
        length["valid_samples"] = count
        prepare_index_cache(config.data, **length, vocab_size=config.model.vocab_size)
        _logger.info("the held-out text has %d sequences of %d: %d are read", there, config.training.seq_len, count)
    if count > there:
        raise OptionError(
            f"--sequences: {given_text(asked)}; the held-out text has {there} of training.seq_len "
            f"{config.training.seq_len}; allowed: 2 to {there - there % _ROWS}, or more text by data.validation"
        )
    data = build_datasets(config.data, **length, vocab_size=config.model.vocab_size)
    stream = BatchStream(data.valid, start_sample=0, micro_batch_size=_ROWS, dp_rank=0, dp_size=1)
    return list(islice(stream, count // _ROWS))


def given_text(asked: int | None) -> str:
    """What a message says of the number of sequences that was asked for."""
    return f"{DEFAULT_SEQUENCES} unless given" if asked is None else f"given {asked}"


def sequence_losses(
    model: MythosModel,
    batches: Sequence[Batch],
    loops: Sequence[int],
    progress: Callable[[int], object] = lambda done: None,
) -> dict[int, list[float]]:
    """The mean loss (nats per token) of each sequence after each of `loops`: of conversations over the tokens that
    count, times those of the sequence over those of a mean sequence, so that the mean over sequences is that over
    tokens. `progress` takes the sequences done. Raises ConfigError, see `token_losses`, and where no token counts."""
    found: dict[int, list[float]] = {count: [] for count in sorted(set(loops))}
    for count, losses in token_losses(model, batches, loops, progress):
        found[count] += losses.sum(1).tolist()
    per_sequence = _targets_per_sequence(batches)
    return {count: [loss / per_sequence for loss in own] for count, own in found.items()}


@torch.inference_mode()
def token_losses(
    model: MythosModel,
    batches: Sequence[Batch],
    loops: Sequence[int],
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[tuple[int, Tensor]]:
    """The losses (nats; 0 of tokens that do not count) of each batch after each of `loops`, as pairs of a loop count
    and float64 [rows, seq].

    A sequence is looped once, up to the last of them; `progress` takes the sequences done. Raises ConfigError for a
    loop count below 1, and for a model with ACT, whose output is no state of one loop."""
    counts = sorted(set(loops))
    if not counts or counts[0] < 1:
        raise OptionError(f"loops: given {list(loops)}; allowed: whole numbers of 1 or more; nearest: 1")
    if counts[-1] > LOOPS:
        raise OptionError(f"loops: given {list(loops)}; allowed: at most {LOOPS}; nearest: {LOOPS}")
    if model.recurrent.halting is not None:
        raise ConfigError(f"halting: the model's is {model.config.halting}; allowed: none")
    device = next(model.parameters()).device
    for batch in batches:
        tokens, targets, positions = (batch[name].to(device) for name in ("tokens", "targets", "positions"))
        e, context = model.encode(tokens, positions=positions)
        h, _ = model.start_loop(e, context=context)
        for loop in range(counts[-1]):
            h, _ = model.step_loop(h, e, loop=loop, context=context)
            if loop + 1 in counts:
                logits = model.decode(h.to(e.dtype), context=context)
                losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                yield loop + 1, losses.view(targets.shape).double()
        progress(len(tokens))


def _targets_per_sequence(batches: Sequence[Batch]) -> float:
    """How many targets of a sequence count, in the mean. Raises ConfigError where none does."""
    counted = sum(int((batch["targets"] != IGNORED_LABEL).sum()) for batch in batches)
    if not counted:
        raise ConfigError("data: no token of the held-out text counts in the loss; allowed: conversations with answers")
    return counted / sum(len(batch["targets"]) for batch in batches)


def paired(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean of losses less others, sequence by sequence, and its standard error."""
    differences = [own - other for own, other in zip(losses, others, strict=True)]
    mean = math.fsum(differences) / len(differences)
    spread = math.fsum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    return mean, math.sqrt(spread / len(differences))


def text_digest(batches: Sequence[Batch]) -> str:
    """Names the text of some batches; losses are compared on the same text only."""
    tokens = b"".join(batch[name].numpy().tobytes() for batch in batches for name in ("tokens", "targets"))
    return hashlib.sha256(tokens).hexdigest()


def loss_table(losses: Mapping[int, Sequence[float]]) -> list[list[str]]:
    """Rows of a table: loops, mean loss, less the loss at the fewest loops with its standard error."""
    first = min(losses)
    rows = [["loops", "loss", f"less that at {first}", "standard error"]]
    for loops, own in sorted(losses.items()):
        mean, error = paired(own, losses[first])
        differs = [] if loops == first else [f"{mean:+.4f}", f"{error:.4f}"]
        rows.append([str(loops), f"{math.fsum(own) / len(own):.4f}", *(differs or ["", ""])])
    return rows


def as_json(losses: Mapping[int, Sequence[float]], batches: Sequence[Batch]) -> dict[str, Any]:
    """What a file keeps of an evaluation."""
    means = {str(loops): math.fsum(own) / len(own) for loops, own in losses.items()}
    return {"text": text_digest(batches), "loss": means, "sequences": {str(n): own for n, own in losses.items()}}
