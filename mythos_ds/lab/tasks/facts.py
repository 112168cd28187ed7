"""Facts that live in the weights, and what follows from two of them: a random graph, cut so that nothing leaks.

An atomic fact (h, r) -> t is an edge. A query "h r1 r2" follows two edges, h -r1-> b -r2-> t. A share of the facts is
only ever seen atomically; queries of two of these are the test out of distribution. Of the queries of two other facts,
some are trained on and the rest held out (Wang et al. 2024, arXiv 2405.15071; arXiv 2604.07822 for looped models).
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.data.batches import Batch, BatchStream, Item, SampleSource
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.io import write_atomic
from mythos_ds.lab.worker import Worker, leave, main
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.callbacks import CallbackState
from mythos_ds.train.data_loader import DataLoader
from mythos_ds.train.run_manifest import RunManifest

LENGTH = 3
"""Tokens of a sequence: an entity and two relations."""
SPLITS = ("atomic", "train", "held_out", "ood")

_TESTED = 2000
_HISTORY = "accuracy.json"

Queries = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Tokens and labels, int64 [queries, 3]."""


@dataclass(frozen=True)
class FactTask:
    """A graph of `entities` (tokens 0 .. S-1) and `relations` (tokens S .. S+R-1), `degree` edges from each entity.

    Attributes:
        ood_share: share of the facts that are seen atomically only.
        held_out_share: share of the queries of the other facts that are not trained on.
    """

    entities: int
    relations: int
    degree: int
    ood_share: float
    held_out_share: float
    graph_seed: int

    def splits(self) -> dict[str, Queries]:
        """Queries by the names of SPLITS, each in a fixed random order; "atomic" holds all facts.

        The label at a position is the entity reached there, as in permutation chains: h, b, t. The model is causal, so
        the label b after "h r1" is what the atomic fact teaches at that place, and nothing about the query. The third
        position of a fact starts anew at h, with label h.
        """
        generator = np.random.default_rng(self.graph_seed)
        heads = np.repeat(np.arange(self.entities), self.degree)
        relations = np.concatenate([generator.permutation(self.relations)[: self.degree] for _ in range(self.entities)])
        relations = relations.astype(np.int64) + self.entities
        tails = generator.integers(self.entities, size=len(heads))
        apart = np.zeros(len(heads), bool)
        apart[generator.permutation(len(heads))[: round(self.ood_share * len(heads))]] = True

        first = np.repeat(np.arange(len(heads)), self.degree)
        second = tails[first] * self.degree + np.tile(np.arange(self.degree), len(heads))
        tokens = np.stack([heads[first], relations[first], relations[second]], 1)
        labels = np.stack([heads[first], tails[first], tails[second]], 1)
        inside = generator.permutation(np.flatnonzero(~apart[first] & ~apart[second]))
        outside = generator.permutation(np.flatnonzero(apart[first] & apart[second]))
        held_out = round(self.held_out_share * len(inside))
        chosen = {"train": inside[held_out:], "held_out": inside[:held_out], "ood": outside}
        facts = generator.permutation(len(heads))
        atomic = np.stack([heads, relations, heads], 1)[facts], np.stack([heads, tails, heads], 1)[facts]
        return {"atomic": atomic} | {name: (tokens[rows], labels[rows]) for name, rows in chosen.items()}


def _answer(split: str) -> int:
    """The position that asks."""
    return 1 if split == "atomic" else 2


def guesses(splits: dict[str, Queries], *, commonest: bool) -> dict[str, float]:
    """Expected share of right answers by split for who knows the last relation's facts but not which entity it follows,
    and says one of their tails at random, or the commonest (any of the commonest, where several are).

    A model gets as much without composing anything; one in S asks too little.
    """
    (_, relations, _), (_, tails, _) = (part.T for part in splits["atomic"])
    counts = np.zeros((relations.max() + 1, relations.max() + 1))
    np.add.at(counts, (relations, tails), 1.0)
    if commonest:
        counts = (counts == counts.max(1, keepdims=True)).astype(float)
    chances = counts / counts.sum(1, keepdims=True).clip(min=1.0)
    shares = {}
    for name in SPLITS:
        tokens, labels = (part[:, _answer(name)] for part in splits[name])
        shares[name] = float(chances[tokens, labels].mean())
    return shares


class Repeated:
    """Samples by number, over and over: each row once in each epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, queries: Sequence[Queries], seed: int, samples: int):
        self._tokens, self._labels = (np.concatenate([own[part] for own in queries]) for part in range(2))
        self._seed, self._samples = seed, samples
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Item:
        epoch, place = divmod(index, len(self._tokens))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._tokens))
        row = self._order[place]
        return {"tokens": self._tokens[row], "targets": self._labels[row], "positions": np.arange(LENGTH)}


class FactLoader:
    """The trainer's batches: all facts and the training queries; validation is on held-out queries."""

    tokenizer: Tokenizer | None = None

    def __init__(
        self,
        splits: dict[str, Queries],
        resolved: ResolvedRun,
        manifest: RunManifest,
        groups: ParallelGroups,
        *,
        identity: dict[str, Any],
    ):
        training = resolved.config.training
        self.identity = identity
        self._accumulation, self._batch = resolved.gradient_accumulation_steps, training.global_batch_size
        self._rows, self._groups = resolved.stages[groups.layout.stage].rows, groups
        seen = (splits["atomic"], splits["train"])
        self._train = Repeated(seen, training.seed, manifest.total_steps * self._batch)
        self._valid = Repeated((splits["held_out"],), training.seed, training.eval_batches * self._batch)

    def steps(self, step: int) -> Iterator[list[Batch]]:
        """See DataLoader."""
        return self._grouped(self._train, step * self._batch)

    def validation(self) -> Iterator[list[Batch]]:
        """See DataLoader."""
        return self._grouped(self._valid, 0)

    def held_out_prompt(self) -> list[int]:
        """See DataLoader."""
        return []

    def _grouped(self, dataset: SampleSource, start: int) -> Iterator[list[Batch]]:
        groups = self._groups
        stream = BatchStream(
            dataset,
            start_sample=start,
            micro_batch_size=self._rows,
            dp_rank=groups.layout.dp_rank,
            dp_size=groups.layout.dp_size,
        )
        while micro_batches := list(islice(stream, self._accumulation)):
            yield micro_batches


def accuracies(model: MythosModel, splits: dict[str, Queries], n_loops: int) -> dict[str, float]:
    """Share of right answers by split, over the first 2000 queries of each; the model stays in the mode it was in."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    shares = {}
    with torch.no_grad():
        for name in SPLITS:
            tokens, labels = (torch.from_numpy(part[:_TESTED]).to(device) for part in splits[name])
            predicted = torch.cat([model(rows, n_loops=n_loops).argmax(-1) for rows in tokens.split(500)])
            shares[name] = (predicted == labels)[:, _answer(name)].float().mean().item()
    model.train(was_training)
    return shares


def measured_steps(total: int) -> list[int]:
    """Steps, twelve in each decade from 10 on, and the last one."""
    steps = {round(10 ** (exponent / 12)) for exponent in range(12, 120)}
    return sorted({step for step in steps if step < total} | {total})


class FactWorker(Worker):
    """A run on a FactTask: accuracy is measured while it trains, and kept beside it for when it goes on."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        assert self.spec.chains is not None, "a spec that names this worker has a task"
        self.task = FactTask(**{name: value for name, value in self.spec.chains.items() if name != "worker"})
        self.splits = self.task.splits()
        self.steps = set(measured_steps(self.resolved.max_steps))
        self.history: dict[str, dict[str, float]] = {}
        if (folder / _HISTORY).is_file():
            self.history = json.loads((folder / _HISTORY).read_text(encoding="utf-8"))

    def open_data(self, resolved: ResolvedRun, manifest: RunManifest, groups: ParallelGroups, step: int) -> DataLoader:
        """See Worker."""
        self.started = time.perf_counter()
        return FactLoader(self.splits, resolved, manifest, groups, identity=asdict(self.task))

    def after_step(self, state: CallbackState) -> None:
        """Note the accuracies, at the steps where they are due."""
        if state.step not in self.steps:
            return
        self.history[str(state.step)] = accuracies(state.model, self.splits, state.config.model.mean_recurrence)
        write_atomic(self.folder / _HISTORY, json.dumps(self.history))

    def evaluate(self, engine: TrainingEngine, data: DataLoader, losses: dict[int, float]) -> dict[str, Any]:
        """The accuracies while it trained, and at the end by loop count."""
        history = sorted((int(step), shares) for step, shares in self.history.items())
        final = {n_loops: accuracies(engine.module, self.splits, n_loops) for n_loops in self.spec.loops}
        return {"history": history, "final": final}


if __name__ == "__main__":
    leave(main(sys.argv[1:], FactWorker))
