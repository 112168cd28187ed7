"""Other layouts of the same training: which fit, how fast they are, and the first change that makes a run fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import product
from math import gcd
from typing import Any

from mythos_ds.config.divisors import divisors
from mythos_ds.config.resolve import ResolvedRun, curriculum_starts, resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.errors import ConfigError
from mythos_ds.hardware import Gpu
from mythos_ds.plan.memory import Memory, memory
from mythos_ds.plan.timing import Timing, least_seconds, timing

COMMON = "parallel."
"""What settings begin with that all training stages share."""
_MOST_STAGES = 4
"""Longer rings multiply what is kept for backwards; docs/parallelism.md."""


@dataclass(frozen=True)
class Layout:
    """A layout and what it comes to. `changes`: section.key -> value, what differs from the configuration."""

    changes: dict[str, Any]
    resolved: ResolvedRun
    memory: Memory
    timing: Timing

    def fits(self, gpu: Gpu) -> bool:
        """Whether the fullest process has room."""
        return self.memory.total <= gpu.memory_bytes


def examine(config: RunConfig, gpus: int, gpu: Gpu, changes: dict[str, Any], grows_from: int = 1) -> Layout:
    """A configuration with changes; grows_from as in `ResolvedRun`. Raises ConfigError where it contradicts itself, or
    is not of ZeRO-3."""
    if config.parallel.zero_stage != 3:
        raise ConfigError(f"parallel.zero_stage: given {config.parallel.zero_stage}; allowed: 3, as in all presets")
    resolved = resolve(with_changes(config, changes), gpus, grows_from)
    return Layout(changes, resolved, memory(resolved), timing(resolved, gpu))


def with_changes(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The configuration with `section.key` values replaced."""
    content = config.model_dump(exclude_unset=True)
    for path, value in changes.items():
        section, key = path.split(".")
        content[section] = {**content.get(section, {}), key: value}
    return RunConfig.model_validate(content)


def remedies(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Changes that save memory, the cheapest first."""
    parallel, training, model = config.parallel, config.training, config.model
    for unit in ("layer", "loop"):
        if unit != parallel.activation_checkpointing:
            yield {"parallel.activation_checkpointing": unit}
    if training.micro_batch_size > 1:
        yield {"training.micro_batch_size": 1}
    ep_size = parallel.ep_size if isinstance(parallel.ep_size, int) else 1
    for factor in (2, 4, 8):
        if model.n_experts % (ep_size * factor) == 0:
            yield {"parallel.ep_size": ep_size * factor}
    depth = training.mean_backprop_depth or -(-model.mean_recurrence // 2)
    if depth > 1:
        yield {"training.mean_backprop_depth": -(-depth // 2)}
    for stages in (2, 4):
        if model.recurrent_layers % stages == 0 and parallel.pp_size == 1:
            sums = _sums(config, stages)
            yield {"parallel.pp_size": stages, "parallel.ep_size": max(1, ep_size // stages), **sums}
    if parallel.offload_optimizer == "none":
        yield {"parallel.offload_optimizer": "cpu"}
    if training.micro_batch_size == 1 and training.seq_len % 2 == 0:
        yield {"training.seq_len": training.seq_len // 2}
    if training.dtype == "bfloat16" and training.grad_dtype == "float32" and parallel.pp_size == 1:
        yield {"training.grad_dtype": "bfloat16"}  # last: not together with a pipeline


def _sums(config: RunConfig, stages: int) -> dict[str, Any]:
    """What a layout changes of a configuration that adds gradients up in bf16, which a pipeline does not."""
    if config.training.grad_dtype == "float32":
        return {}
    return {"training.grad_dtype": "bfloat16" if stages == 1 else "float32"}


def first_remedy(config: RunConfig, gpus: int, gpu: Gpu) -> Layout | None:
    """The first of the remedies that fits; else the first few of those that help which fit together; None where even
    all of them do not."""
    helpful: list[tuple[float, dict[str, Any]]] = []
    least = memory(resolve(config, gpus)).total
    for changes in remedies(config):
        found = _examined(config, gpus, gpu, changes)
        if found is not None and found.fits(gpu):
            return found
        if found is not None and found.memory.total < least:
            helpful.append((found.memory.total, changes))
    together: dict[str, Any] = {}
    for total, changes in helpful:
        better = [other for size, other in helpful if other.keys() == changes.keys() and size < total]
        if better:
            continue
        together |= changes
        found = _examined(config, gpus, gpu, together)
        if found is not None and found.fits(gpu):
            return found
    return None


def remedied(configs: Sequence[RunConfig], gpus: int, gpu: Gpu) -> tuple[Layout, ...] | None:
    """The layouts of all training stages with `first_remedy` of each that does not fit; what it changes of `parallel`
    it changes in all. None where that is not enough."""
    common: dict[str, Any] = {}
    own: list[dict[str, Any]] = []
    for config in configs:
        changed = with_changes(config, common)
        found = examine(changed, gpus, gpu, {})
        remedy = found if found.fits(gpu) else first_remedy(changed, gpus, gpu)
        if remedy is None:
            return None
        common |= {key: value for key, value in remedy.changes.items() if key.startswith(COMMON)}
        own.append({key: value for key, value in remedy.changes.items() if not key.startswith(COMMON)})
        if len(configs) == 1:
            return (remedy,)
    layouts = [
        _examined(config, gpus, gpu, {**common, **changes}, mean)
        for config, changes, mean in zip(configs, own, curriculum_starts(configs), strict=True)
    ]
    fitting = [layout for layout in layouts if layout is not None and layout.fits(gpu)]
    return tuple(fitting) if len(fitting) == len(configs) else None


def examine_stages(configs: Sequence[RunConfig], gpus: int, gpu: Gpu) -> tuple[Layout, ...]:
    """The layout of each training stage of a run as it is configured. Raises as `examine` does."""
    means = curriculum_starts(configs)
    return tuple(examine(config, gpus, gpu, {}, mean) for config, mean in zip(configs, means, strict=True))


def _examined(config: RunConfig, gpus: int, gpu: Gpu, changes: dict[str, Any], grows_from: int = 1) -> Layout | None:
    try:
        return examine(config, gpus, gpu, changes, grows_from)
    except ConfigError:
        return None


def candidates(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Expert-parallel sizes inside a node or over whole nodes, rings of few stages, half, once and twice the
    micro-batch, without recomputation, by layer and by loop; each dispatcher, without and with two lanes."""
    model, rows = config.model, config.training.micro_batch_size
    for stages in (p for p in (1, 2, _MOST_STAGES) if model.recurrent_layers % p == 0 and gpus % p == 0):
        per_stage = gpus // stages
        sizes = divisors(gcd(per_stage, model.n_experts))
        aware = [n for n in sizes if gpu.gpus_per_node % n == 0 or n % gpu.gpus_per_node == 0]
        for ep_size in aware:
            for micro_batch, kept in product(sorted({max(1, rows // 2), rows, 2 * rows}), ("layer", "loop", "none")):
                changes: dict[str, Any] = {"parallel.ep_size": ep_size, "training.micro_batch_size": micro_batch}
                changes |= _sums(config, stages)
                changes |= {"parallel.pp_size": stages, "parallel.activation_checkpointing": kept}
                for dispatch, lanes in _exchanges(ep_size, gpu.gpus_per_node):
                    yield {**changes, "parallel.dispatch": dispatch, "parallel.overlap": lanes}


def _exchanges(ep_size: int, per_node: int) -> Iterator[tuple[str, bool]]:
    """How rows may reach their experts."""
    if ep_size == 1:
        yield "all_to_all", False
        return
    yield from product(["all_to_all", "per_rank", *(["per_node"] if ep_size > per_node else [])], (False, True))


def _savers(config: RunConfig) -> list[dict[str, Any]]:
    """What every layout is tried with where none fits without: optimizer state in host memory, then also gradient
    through half as many loops, which changes the training."""
    offload = {"parallel.offload_optimizer": "cpu"}
    depth = config.training.mean_backprop_depth or -(-config.model.mean_recurrence // 2)
    return [{}, offload, {**offload, "training.mean_backprop_depth": -(-depth // 2)}]


def ranked(configs: Sequence[RunConfig], gpus: int, gpu: Gpu, objective: str, *, most: int) -> list[tuple[Layout, ...]]:
    """The best layouts that fit every training stage, as one `Layout` of each: by time of the run as built, or by
    memory of its fullest stage. Times come first; memory is looked at in that order until `most` layouts fit. A layout
    that has no room is not tried with more. By memory all keep the plainest dispatcher."""
    for number in range(len(_savers(configs[0]))):
        found: list[tuple[Layout, ...]] = []
        for layouts in _by_time(_tried(configs, gpus, gpu, number, plain=objective == "memory"), gpu):
            found.append(layouts)
            if len(found) == most and objective == "time":
                break
        if found:
            break
    if objective == "memory":
        found.sort(key=lambda layouts: max(layout.memory.total for layout in layouts))
    return found[:most]


Candidate = tuple[list[ResolvedRun], tuple[dict[str, Any], ...]]
"""A layout of all training stages: each as resolved, and its changes."""


def _tried(configs: Sequence[RunConfig], gpus: int, gpu: Gpu, saver: int, *, plain: bool) -> list[Candidate]:
    """The candidates that contradict nothing; plain: those that recompute, and send rows one by one."""
    means, made = curriculum_starts(configs), []
    for candidate in candidates(configs[0], gpus, gpu):
        keeps_all = candidate["parallel.activation_checkpointing"] == "none"
        if plain and (keeps_all or candidate["parallel.dispatch"] != "all_to_all"):
            continue
        of_stages = _in_all_stages(configs, candidate, saver)
        try:
            runs = [
                resolve(with_changes(config, changes), gpus, mean)
                for config, changes, mean in zip(configs, of_stages, means, strict=True)
            ]
        except ConfigError:
            continue
        made.append((runs, of_stages))
    return made


def _by_time(tried: Sequence[Candidate], gpu: Gpu) -> Iterator[tuple[Layout, ...]]:
    """The candidates that fit, the fastest first. One is looked at closely, which takes seconds, once it may be the
    next: first at its memory, as most of the fast ones have no room, and as what has none rules out others."""
    floors = [_mean_seconds([least_seconds(run, gpu) for run in runs], runs) for runs, _ in tried]
    waiting = sorted(range(len(tried)), key=lambda index: -floors[index])
    closely: list[tuple[float, int, tuple[Layout, ...]]] = []
    too_large: list[_TooLarge] = []
    while waiting or closely:
        while waiting and (not closely or floors[waiting[-1]] < closely[0][0]):
            index = waiting.pop()
            runs, of_stages = tried[index]
            sizes = _fitting(gpu, too_large, runs, of_stages)
            if sizes is None:
                continue
            parts = zip(of_stages, runs, sizes, strict=True)
            layouts = tuple(Layout(changes, run, size, timing(run, gpu)) for changes, run, size in parts)
            seconds = _mean_seconds([layout.timing.built_s for layout in layouts], runs)
            heappush(closely, (seconds, index, layouts))
        if closely:
            yield heappop(closely)[2]


_FAR = 1.1
"""Times a GPU's memory: more than what dispatchers and lanes differ by."""


@dataclass(frozen=True)
class _TooLarge:
    """A layout of a training stage that has no room; by far: whatever its dispatcher and lanes."""

    stage: int
    changes: dict[str, Any]
    by_far: bool


def _fitting(
    gpu: Gpu, too_large: list[_TooLarge], runs: Sequence[ResolvedRun], of_stages: Sequence[dict[str, Any]]
) -> list[Memory] | None:
    """The memory of all training stages, or None where one does not fit; that one is added to `too_large`."""
    found = []
    for index, (run, changes) in enumerate(zip(runs, of_stages, strict=True)):
        if any(other.stage == index and _asks_more(changes, other) for other in too_large):
            return None
        found.append(memory(run))
        if found[-1].total > gpu.memory_bytes:
            too_large.append(_TooLarge(index, changes, found[-1].total > _FAR * gpu.memory_bytes))
            return None
    return found


def _in_all_stages(configs: Sequence[RunConfig], changes: dict[str, Any], saver: int) -> tuple[dict[str, Any], ...]:
    """A candidate of the first training stage, with saver number `saver`, for each of them: the same `parallel`, and
    the same factor on its own micro-batch."""
    rows = "training.micro_batch_size"
    made = []
    for config in configs:
        scaled = config.training.micro_batch_size * changes[rows] // configs[0].training.micro_batch_size
        made.append({**changes, rows: max(1, scaled), **_savers(config)[saver]})
    return tuple(made)


def _mean_seconds(steps: Sequence[float], runs: Sequence[ResolvedRun]) -> float:
    """Seconds per token of all stages, given those of a step of each."""
    tokens = sum(run.total_tokens for run in runs)
    return sum(
        seconds / run.tokens_per_step * run.total_tokens / tokens for seconds, run in zip(steps, runs, strict=True)
    )


def _asks_more(changes: dict[str, Any], other: _TooLarge) -> bool:
    """Whether a layout needs at least the memory that another lacks: all alike, but as many or more rows, and the same
    recomputation or none."""
    loose = {"training.micro_batch_size", "parallel.activation_checkpointing"}
    loose |= {"parallel.dispatch", "parallel.overlap"} if other.by_far else set()
    alike = all(changes[key] == other.changes[key] for key in changes.keys() - loose)
    unit, other_unit = (c["parallel.activation_checkpointing"] for c in (changes, other.changes))
    more_rows = changes["training.micro_batch_size"] >= other.changes["training.micro_batch_size"]
    return alike and more_rows and unit in ("none", other_unit)
