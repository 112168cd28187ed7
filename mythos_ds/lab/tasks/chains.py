"""Permutation chains: follow k relations from an entity, where the relations are facts that live in the weights.

A sequence holds chains one after the other: a random entity, then relations; the target at each position is the entity
reached so far. Chains of training have at most `train_hops` relations and fill sequences as long as the test's chains,
so that depth is all that is new in the test (Fan et al. 2024, arXiv 2409.15647; Wang et al. 2026, arXiv 2604.07822).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.data.batches import Batch, BatchStream, Item
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.run_manifest import RunManifest

_TRAIN, _VALID, _TEST = range(3)


@dataclass(frozen=True)
class ChainTask:
    """S entities (tokens 0 .. S-1), R relations (tokens S .. S+R-1), each relation a random permutation."""

    entities: int
    relations: int
    train_hops: int
    test_hops: int
    table_seed: int

    @property
    def vocabulary(self) -> int:
        """Tokens there are."""
        return self.entities + self.relations

    @property
    def length(self) -> int:
        """Tokens of a sequence: the test's entity and relations."""
        return self.test_hops + 1

    def tables(self) -> NDArray[np.int64]:
        """int64 [relations, entities]: where each relation leads."""
        generator = np.random.default_rng(self.table_seed)
        return np.stack([generator.permutation(self.entities) for _ in range(self.relations)])


class Chains:
    """Samples by number, the same for the same (task, split, seed)."""

    def __init__(self, task: ChainTask, split: int, seed: int, samples: int):
        self._task, self._split, self._seed, self._samples = task, split, seed, samples
        self._tables = task.tables()

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Item:
        task = self._task
        generator = np.random.Generator(np.random.Philox(key=[self._seed, index], counter=self._split))
        relations = generator.integers(task.relations, size=task.length)
        entities = generator.integers(task.entities, size=task.length)
        lengths = generator.integers(1, task.train_hops + 1, size=task.length)
        if self._split == _TEST:
            lengths[0] = task.test_hops
        tokens = relations + task.entities
        labels = np.empty(task.length, np.int64)
        # A chain takes its entity and `length` relations; the last one is cut off.
        starts = {0, *(int(start) for start in np.cumsum(lengths + 1))}
        current = 0
        for place in range(task.length):
            if place in starts:
                current = tokens[place] = entities[place]
            else:
                current = self._tables[relations[place], current]
            labels[place] = current
        return {"tokens": tokens, "targets": labels, "positions": np.arange(task.length)}


class ChainLoader:
    """The trainer's batches of a chain task."""

    tokenizer: Tokenizer | None = None

    def __init__(self, task: ChainTask, resolved: ResolvedRun, manifest: RunManifest, groups: ParallelGroups):
        training = resolved.config.training
        self.task, self.identity = task, asdict(task)
        self._accumulation, self._batch = resolved.gradient_accumulation_steps, training.global_batch_size
        self._rows, self._groups = resolved.stages[groups.layout.stage].rows, groups
        self._train = Chains(task, _TRAIN, training.seed, manifest.total_steps * self._batch)
        self._valid = Chains(task, _VALID, training.seed, training.eval_batches * self._batch)

    def steps(self, step: int) -> Iterator[list[Batch]]:
        """See DataLoader."""
        return self._grouped(self._train, step * self._batch)

    def validation(self) -> Iterator[list[Batch]]:
        """See DataLoader."""
        return self._grouped(self._valid, 0)

    def held_out_prompt(self) -> list[int]:
        """See DataLoader."""
        return []

    def _grouped(self, dataset: Chains, start: int) -> Iterator[list[Batch]]:
        stream = BatchStream(
            dataset,
            start_sample=start,
            micro_batch_size=self._rows,
            dp_rank=self._groups.layout.dp_rank,
            dp_size=self._groups.layout.dp_size,
        )
        while micro_batches := list(islice(stream, self._accumulation)):
            yield micro_batches


def accuracy(
    engine: TrainingEngine, task: ChainTask, loop_counts: Sequence[int], *, chains: int, seed: int
) -> dict[int, list[float]]:
    """Share of right answers after 1 .. test_hops hops, by loop count, on fresh chains."""
    dataset = Chains(task, _TEST, seed, chains)
    items = [dataset[index] for index in range(chains)]
    tokens, labels = (torch.from_numpy(np.stack([item[name] for item in items])) for name in ("tokens", "targets"))
    return {n_loops: _hits(engine, tokens, labels, n_loops) for n_loops in loop_counts}


def _hits(engine: TrainingEngine, tokens: Tensor, labels: Tensor, n_loops: int) -> list[float]:
    predicted = torch.cat([engine.logits(rows, n_loops).argmax(-1).cpu() for rows in tokens.split(250)])
    return (predicted == labels).float().mean(0)[1:].tolist()


def frontier(accuracies: dict[int, list[float]], threshold: float = 0.85) -> dict[int, int]:
    """By loop count, the most hops up to which every accuracy reaches `threshold`."""
    return {
        loops: next((hop for hop, value in enumerate(values) if value < threshold), len(values))
        for loops, values in accuracies.items()
    }


def slope(front: dict[int, int], test_hops: int) -> float | None:
    """Hops gained per loop: least squares over the loop counts whose frontier is inside (0, test_hops); None below two
    of them."""
    inside = [(loops, hops) for loops, hops in front.items() if 0 < hops < test_hops]
    if len(inside) < 2:
        return None
    loops, hops = zip(*inside, strict=True)
    return float(np.polyfit(loops, hops, 1)[0])


def task_from(values: dict[str, Any]) -> ChainTask:
    """The task that `asdict` was made from."""
    return ChainTask(**values)
