"""How a model is cut into pipeline stages: which layers, which processes, how many rows. Pure; no torch."""

from dataclasses import dataclass
from itertools import accumulate

from mythos_ds.config.attention_shapes import attention_matmul
from mythos_ds.config.schema import ModelConfig, ParallelConfig, RunConfig


@dataclass(frozen=True)
class Part:
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
    """A group of consecutive processes that holds one part of the model.

    Attributes:
        first_rank: rank of its first process.
        size: its processes.
        rows: sequences per process and micro-batch.
    """

    part: Part
    first_rank: int
    size: int
    rows: int


def is_pipelined(parallel: ParallelConfig) -> bool:
    """Whether there is more than one stage."""
    return parallel.pp_size != 1


def whole(model: ModelConfig) -> Part:
    """All of a model."""
    return Part(
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


def rows_per_micro_batch(config: RunConfig, world_size: int) -> int:
    """Sequences of a micro-batch over all processes of a stage: micro_batch_size for each process of a stage that has
    recurrent layers."""
    sizes = stage_sizes(config.parallel, world_size)
    return config.training.micro_batch_size * (sizes[0] if isinstance(config.parallel.pp_size, int) else sizes[1])


def cut(config: RunConfig, world_size: int) -> tuple[Stage, ...]:
    """The stages of a checked run; one without pipeline."""
    sizes, rows = stage_sizes(config.parallel, world_size), rows_per_micro_batch(config, world_size)
    parts = _ring(config.model, len(sizes)) if isinstance(config.parallel.pp_size, int) else _literal(config.model)
    firsts = [last - size for last, size in zip(accumulate(sizes), sizes, strict=True)]
    return tuple(Stage(part, first, size, rows // size) for part, first, size in zip(parts, firsts, sizes, strict=True))


def _ring(model: ModelConfig, n_stages: int) -> list[Part]:
    per_stage = model.recurrent_layers // n_stages
    layer = attention_matmul(model) + 3 * model.dim * model.ffn_dim
    loads = [0.0] * n_stages
    loads[-1] = model.vocab_size * model.dim / layer
    coda = _spread(model.coda_layers, loads)
    prelude = _spread(model.prelude_layers, loads)
    return [
        Part(
            prelude[stage],
            _numbers(stage * per_stage, (stage + 1) * per_stage),
            coda[stage],
            embeds=stage == 0,
            loops=stage == 0,
            predicts=stage == n_stages - 1,
        )
        for stage in range(n_stages)
    ]


def _literal(model: ModelConfig) -> list[Part]:
    everything = whole(model)
    return [
        Part(everything.prelude, (), (), embeds=True, loops=False, predicts=False),
        Part((), everything.recurrent, (), embeds=False, loops=True, predicts=False),
        Part((), (), everything.coda, embeds=False, loops=False, predicts=True),
    ]


def _spread(layers: int, loads: list[float]) -> list[tuple[int, ...]]:
    """Consecutive layers for each stage, each counted for the least loaded stage (the first of equals); `loads`, in
    dense layers, grow by them."""
    counts = [0] * len(loads)
    for _ in range(layers):
        stage = loads.index(min(loads))
        counts[stage] += 1
        loads[stage] += 1
    ends = list(accumulate(counts))
    return [_numbers(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _numbers(start: int, end: int) -> tuple[int, ...]:
    return tuple(range(start, end))
