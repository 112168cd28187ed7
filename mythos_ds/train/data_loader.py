"""The batches of every optimizer step, from the datasets of a training stage's phases, which the run manifest names."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.data.batches import Batch, BatchStream
from mythos_ds.data.datasets import TokenDataset, TokenDatasets, build_datasets, prepare_index_cache
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.validation import validation_notes
from mythos_ds.log import get_logger
from mythos_ds.parallel.collective import on_rank_zero, together
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.run_manifest import RunManifest

_PROMPT_TOKENS = 16

_logger = get_logger(__name__)


class DataLoader(Protocol):
    """Training and held-out batches of this rank; a pure function of the manifest and the step.

    Attributes:
        tokenizer: of text; None for data that is not text.
        identity: what the data is, in JSON values; pinned at a run's start.
    """

    tokenizer: Tokenizer | None
    identity: dict[str, Any]

    def steps(self, step: int) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step from `step` to the end of the run."""
        ...

    def validation(self) -> Iterator[list[Batch]]:
        """The held-out micro-batches of one global batch after the other, the same at every call; none without
        validation."""
        ...

    def held_out_prompt(self) -> list[int]:
        """The first tokens of the held-out text; none without validation."""
        ...


class TextLoader:
    """The loader of the configured datasets."""

    def __init__(
        self, resolved: ResolvedRun, manifest: RunManifest, groups: ParallelGroups, datasets: dict[int, TokenDatasets]
    ):
        self._training = resolved.config.training
        self._accumulation = resolved.gradient_accumulation_steps
        self._workers = resolved.config.data.num_workers
        self._rows = resolved.stages[groups.layout.stage].rows
        self._manifest, self._groups, self._datasets = manifest, groups, datasets
        self.tokenizer: Tokenizer | None = datasets[0].tokenizer
        self.identity: dict[str, Any] = datasets[0].identity

    @classmethod
    def open(cls, resolved: ResolvedRun, manifest: RunManifest, groups: ParallelGroups, step: int) -> "TextLoader":
        """Open the datasets needed from `step` on; rank 0 builds their index files first. Raises DataError."""
        requests = needed_arguments(resolved, manifest, step)
        data = resolved.config.data

        def prepare() -> None:
            for arguments in requests.values():
                prepare_index_cache(data, **arguments)

        on_rank_zero(groups, prepare)
        if groups.rank == 0:
            notes = validation_notes(data, resolved.config.training, exact=True)
            for note in notes:
                _logger.warning("%s", note)
        datasets = together(
            groups, lambda: {index: build_datasets(data, **arguments) for index, arguments in requests.items()}
        )
        return cls(resolved, manifest, groups, datasets)

    def steps(self, step: int) -> Iterator[list[Batch]]:
        for index, phase in enumerate(self._manifest.phases):
            if step >= phase.end_step:
                continue
            batches, start = self._manifest.batches, self._manifest.start_step
            start_sample = batches.samples(step - start) - batches.samples(phase.start_step - start)
            micro_batches = self._stream(self._datasets[index].train, start_sample)
            while step < phase.end_step:
                count = self._accumulation * batches.at(step - start) // self._training.global_batch_size
                yield list(islice(micro_batches, count))
                step += 1

    def validation(self) -> Iterator[list[Batch]]:
        if not len(self._datasets[0].valid):
            return
        micro_batches = self._stream(self._datasets[0].valid, 0)
        for _ in range(self._training.eval_batches):
            yield list(islice(micro_batches, self._accumulation))

    def held_out_prompt(self) -> list[int]:
        valid = self._datasets[0].valid
        return [int(token) for token in valid[0]["tokens"][:_PROMPT_TOKENS]] if len(valid) else []

    def _stream(self, dataset: TokenDataset, start_sample: int) -> Iterator[Batch]:
        return iter(
            BatchStream(
                dataset,
                start_sample=start_sample,
                micro_batch_size=self._rows,
                dp_rank=self._groups.layout.dp_rank,
                dp_size=self._groups.layout.dp_size,
                num_workers=self._workers,
            )
        )


def needed_arguments(resolved: ResolvedRun, manifest: RunManifest, step: int) -> dict[int, dict[str, int]]:
    """`dataset_arguments` of each phase read from `step` on, and of the first: its held-out part always is."""
    needed = sorted({0, *range(manifest.phase_index(step), len(manifest.phases))})
    return {index: dataset_arguments(resolved, manifest, index) for index in needed}


def dataset_arguments(resolved: ResolvedRun, manifest: RunManifest, index: int) -> dict[str, int]:
    """What `prepare_index_cache` and `build_datasets` need to know of phase `index`."""
    training, phase = resolved.config.training, manifest.phases[index]
    first, last = (manifest.batches.samples(step - manifest.start_step) for step in (phase.start_step, phase.end_step))
    return {
        "seq_len": training.seq_len,
        "train_samples": last - first,
        # The first phase's held-out part serves all phases, so that validation losses compare.
        "valid_samples": training.eval_batches * training.global_batch_size if index == 0 else 0,
        "seed": phase.seed,
        "vocab_size": resolved.config.model.vocab_size,
    }
