"""Which rank holds what: its pipeline stage, its layers, its experts, its rows of a micro-batch. Pure; no torch."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import accumulate

from mythos_ds.config.attention_shapes import attention_matmul
from mythos_ds.config.schema import ModelConfig, ParallelConfig, RunConfig

PipelineSize = int | list[int]
"""`parallel.pp_size`: the stages of a ring, or the processes of three literal stages."""


@dataclass(frozen=True)
class ModelChunk:
    """What of a model one pipeline stage holds; layers by their index in the whole model.

    Attributes:
        embeds: the embedding.
        loops: the loop's own parts: prelude norm, injection, loop embedding, LoRA, halting.
        predicts: the final norm and the head.
    """

    prelude: tuple[int, ...]
    recurrent: tuple[int, ...]
    coda: tuple[int, ...]
    embeds: bool
    loops: bool
    predicts: bool


@dataclass(frozen=True)
class Stage:
    """A group of consecutive processes that holds one chunk of the model.

    Attributes:
        first_rank: rank of its first process.
        size: its processes.
        rows: sequences per process and micro-batch.
    """

    part: ModelChunk
    first_rank: int
    size: int
    rows: int


@dataclass(frozen=True)
class RankLayout:
    """One rank's place in a run.

    Ranks are dealt out to pipeline stages, consecutive ones each; without pipeline there is one stage. The ranks of a
    stage are data-parallel: each has its rows of every micro-batch. In a stage with experts, `ep_size` consecutive
    ranks share these.

    Attributes:
        stage_sizes: ranks of each stage.
        expert_stages: the stages that have experts, by index.
        run_ep_size: ranks that share the experts, in those stages.
    """

    rank: int
    stage_sizes: tuple[int, ...]
    expert_stages: tuple[int, ...] = (0,)
    run_ep_size: int = 1

    @classmethod
    def of(cls, stages: Sequence[Stage], ep_size: int, rank: int) -> "RankLayout":
        """The place of `rank` in a run of these stages."""
        experts = tuple(index for index, stage in enumerate(stages) if stage.part.recurrent)
        return cls(rank, tuple(stage.size for stage in stages), experts, ep_size)

    @property
    def world_size(self) -> int:
        """All ranks."""
        return sum(self.stage_sizes)

    @property
    def pipelined(self) -> bool:
        """Whether there is more than one stage."""
        return len(self.stage_sizes) > 1

    @property
    def ring(self) -> bool:
        """Whether every stage holds a share of the loop's layers, so that the last one sends to the first."""
        return self.pipelined and len(self.expert_stages) == len(self.stage_sizes)

    @property
    def stage(self) -> int:
        """Index of the rank's stage."""
        return bisect_right(list(accumulate(self.stage_sizes)), self.rank)

    @property
    def is_last_stage(self) -> bool:
        """Whether the rank's stage computes the loss."""
        return self.stage == len(self.stage_sizes) - 1

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage; -1 is the last one."""
        last = list(accumulate(self.stage_sizes))[stage]
        return range(last - self.stage_sizes[stage], last)

    @property
    def first_rank(self) -> int:
        """The first rank of the rank's stage."""
        return self.ranks_of(self.stage).start

    @property
    def dp_rank(self) -> int:
        """Place among the ranks of the stage."""
        return self.rank - self.first_rank

    @property
    def dp_size(self) -> int:
        """Ranks of the stage."""
        return self.stage_sizes[self.stage]

    @property
    def expert_stage_size(self) -> int:
        """Ranks of a stage that has experts."""
        return self.stage_sizes[self.expert_stages[0]]

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts of the rank's stage; 1 where it has none."""
        return self.run_ep_size if self.stage in self.expert_stages else 1

    @property
    def ep_rank(self) -> int:
        """Place among the ranks that share the experts."""
        return self.dp_rank % self.ep_size

    @property
    def expert_copy(self) -> int:
        """Which of the stage's copies of the experts the rank has a share of."""
        return self.dp_rank // self.ep_size

    @property
    def expert_copies(self) -> range:
        """The ranks that hold the same experts as this one."""
        return self.ranks_of(self.stage)[self.ep_rank :: self.ep_size]

    def expert_range(self, n_experts: int) -> range:
        """The experts that the rank holds in each of its layers; none where its stage has no experts."""
        if self.stage not in self.expert_stages:
            return range(0)
        local = n_experts // self.ep_size
        return range(self.ep_rank * local, (self.ep_rank + 1) * local)

    def rows_of(self, micro_batch: int) -> range:
        """The rows that the rank computes, of a micro-batch of this many."""
        rows = micro_batch // self.dp_size
        return range(self.dp_rank * rows, (self.dp_rank + 1) * rows)

    def peers(self, stage: int, rows: int) -> list[tuple[int, range]]:
        """The ranks of another stage that compute rows of this rank, with these rows counted among this rank's `rows`.
        Stages of different size cut a micro-batch differently."""
        ranks, start = self.ranks_of(stage), self.dp_rank * rows
        other_rows = rows * self.dp_size // len(ranks)
        found = []
        for place in range(start // other_rows, (start + rows - 1) // other_rows + 1):
            first, last = max(start, place * other_rows), min(start + rows, (place + 1) * other_rows)
            found.append((ranks[place], range(first - start, last - start)))
        return found

    @property
    def all_stages(self) -> tuple[range, ...]:
        """The ranks of each stage."""
        return tuple(self.ranks_of(stage) for stage in range(len(self.stage_sizes)))

    @property
    def all_expert_groups(self) -> tuple[range, ...]:
        """The groups of ranks that share experts, of all stages that have some."""
        return tuple(
            self.ranks_of(stage)[start : start + self.run_ep_size]
            for stage in self.expert_stages
            for start in range(0, self.stage_sizes[stage], self.run_ep_size)
        )

    @property
    def all_expert_copies(self) -> tuple[range, ...]:
        """The groups of ranks that hold the same experts, of all stages that have some."""
        places = range(self.run_ep_size)
        return tuple(
            self.ranks_of(stage)[place :: self.run_ep_size] for stage in self.expert_stages for place in places
        )

    def expert_nodes(self, ranks_per_node: int) -> tuple[range, ...]:
        """The groups of ranks that share experts, cut by node: those of one group follow each other, each as long."""
        return tuple(
            group[start : start + ranks_per_node]
            for group in self.all_expert_groups
            for start in range(0, self.run_ep_size, ranks_per_node)
        )

    def experts_across_nodes(self, ranks_per_node: int) -> tuple[range, ...]:
        """The ranks of equal place in the nodes of each group that shares experts."""
        places = range(ranks_per_node)
        return tuple(group[place::ranks_per_node] for group in self.all_expert_groups for place in places)


def is_pipelined(parallel: ParallelConfig) -> bool:
    """Whether there is more than one stage."""
    return parallel.pp_size != 1


def whole_model(model: ModelConfig) -> ModelChunk:
    """All of a model."""
    return ModelChunk(
        _numbers(0, model.prelude_layers),
        _numbers(0, model.recurrent_layers),
        _numbers(0, model.coda_layers),
        embeds=True,
        loops=True,
        predicts=True,
    )


def stage_sizes(parallel: ParallelConfig, world_size: int) -> tuple[int, ...]:
    """Processes of each stage."""
    if isinstance(parallel.pp_size, int):
        return (world_size // parallel.pp_size,) * parallel.pp_size
    return tuple(parallel.pp_size)


def expert_stage_size(pp_size: PipelineSize, world_size: int) -> int:
    """Processes of a pipeline stage that has recurrent layers, and with them experts."""
    return world_size // pp_size if isinstance(pp_size, int) else pp_size[1]


def rows_per_micro_batch(config: RunConfig, world_size: int) -> int:
    """Sequences of a micro-batch over all processes of a stage: micro_batch_size for each process of a stage that has
    recurrent layers."""
    return config.training.micro_batch_size * expert_stage_size(config.parallel.pp_size, world_size)


def stages_of(config: RunConfig, world_size: int) -> tuple[Stage, ...]:
    """The stages of a checked run; one without pipeline."""
    sizes, rows = stage_sizes(config.parallel, world_size), rows_per_micro_batch(config, world_size)
    parts = _ring(config.model, len(sizes)) if isinstance(config.parallel.pp_size, int) else _literal(config.model)
    firsts = [last - size for last, size in zip(accumulate(sizes), sizes, strict=True)]
    return tuple(Stage(part, first, size, rows // size) for part, first, size in zip(parts, firsts, sizes, strict=True))


def _ring(model: ModelConfig, n_stages: int) -> list[ModelChunk]:
    per_stage = model.recurrent_layers // n_stages
    layer = attention_matmul(model) + 3 * model.dim * model.ffn_dim
    loads = [0.0] * n_stages
    loads[-1] = model.vocab_size * model.dim / layer
    coda = _spread(model.coda_layers, loads)
    prelude = _spread(model.prelude_layers, loads)
    return [
        ModelChunk(
            prelude[stage],
            _numbers(stage * per_stage, (stage + 1) * per_stage),
            coda[stage],
            embeds=stage == 0,
            loops=stage == 0,
            predicts=stage == n_stages - 1,
        )
        for stage in range(n_stages)
    ]


def _literal(model: ModelConfig) -> list[ModelChunk]:
    everything = whole_model(model)
    return [
        ModelChunk(everything.prelude, (), (), embeds=True, loops=False, predicts=False),
        ModelChunk((), everything.recurrent, (), embeds=False, loops=True, predicts=False),
        ModelChunk((), (), everything.coda, embeds=False, loops=False, predicts=True),
    ]


def _spread(layers: int, loads: list[float]) -> list[tuple[int, ...]]:
    """Consecutive layers for each stage, each counted for the least loaded stage (the first of equals); `loads`, in
    dense layers, grow by them."""
    counts = [0] * len(loads)
    queue = [(load, stage) for stage, load in enumerate(loads)]
    heapify(queue)
    for _ in range(layers):
        load, stage = queue[0]
        counts[stage] += 1
        loads[stage] = load + 1
        heapreplace(queue, (load + 1, stage))
    ends = list(accumulate(counts))
    return [_numbers(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _numbers(start: int, end: int) -> tuple[int, ...]:
    return tuple(range(start, end))
