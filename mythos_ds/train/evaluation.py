"""Loss on held-out text at several loop counts."""

import math
from collections.abc import Callable, Iterable

from mythos_ds.data.batches import Batch
from mythos_ds.engine.training_engine import TrainingEngine


def losses_at(
    engine: TrainingEngine, batches: Callable[[], Iterable[list[Batch]]], loop_counts: Iterable[int]
) -> dict[int, float]:
    """Mean cross-entropy in nats per token that counts over all ranks' batches, by loop count; {} where there are no
    batches.

    `batches` is called once per loop count, so that every count sees the same text; it yields what goes through the
    model together.
    """
    losses = {}
    for n_loops in loop_counts:
        values, counts = list[float](), list[float]()
        for together in batches():
            values.append(engine.eval_loss(together, n_loops))
            counted = engine.counted_targets(together)
            counts.append(1.0 if counted is None else counted)
        if any(counts):
            weighted = [value * count for value, count in zip(values, counts, strict=True)]
            losses[n_loops] = math.fsum(weighted) / math.fsum(counts)
    return losses


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
