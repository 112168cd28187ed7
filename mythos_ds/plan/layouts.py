"""Other layouts of the same training: which fit, how fast they are, and the first change that makes a run fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Any

from mythos_ds.config.divisors import divisors
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.errors import ConfigError
from mythos_ds.hardware import Gpu
from mythos_ds.plan.memory import Memory, memory
from mythos_ds.plan.timing import Timing, timing

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


def examine(config: RunConfig, gpus: int, gpu: Gpu, changes: dict[str, Any]) -> Layout:
    """A configuration with changes. Raises ConfigError where it contradicts itself, or is not of ZeRO-3."""
    if config.parallel.zero_stage != 3:
        raise ConfigError(f"parallel.zero_stage: given {config.parallel.zero_stage}; allowed: 3, as in all presets")
    resolved = resolve(with_changes(config, changes), gpus)
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
    if parallel.activation_checkpointing == "none":
        yield {"parallel.activation_checkpointing": "loop"}
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
            yield {"parallel.pp_size": stages, "parallel.ep_size": max(1, ep_size // stages)}
    if parallel.offload_optimizer == "none":
        yield {"parallel.offload_optimizer": "cpu"}
    if training.micro_batch_size == 1 and training.seq_len % 2 == 0:
        yield {"training.seq_len": training.seq_len // 2}


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


def _examined(config: RunConfig, gpus: int, gpu: Gpu, changes: dict[str, Any]) -> Layout | None:
    try:
        return examine(config, gpus, gpu, changes)
    except ConfigError:
        return None


def candidates(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Expert-parallel sizes inside a node or over whole nodes, rings of few stages, half, once and twice the
    micro-batch, with and without recomputation."""
    model, rows = config.model, config.training.micro_batch_size
    for stages in (p for p in (1, 2, _MOST_STAGES) if model.recurrent_layers % p == 0 and gpus % p == 0):
        per_stage = gpus // stages
        sizes = divisors(gcd(per_stage, model.n_experts))
        aware = [n for n in sizes if gpu.gpus_per_node % n == 0 or n % gpu.gpus_per_node == 0]
        for ep_size in aware:
            for micro_batch, kept in product(sorted({max(1, rows // 2), rows, 2 * rows}), ("loop", "none")):
                changes = {"parallel.ep_size": ep_size, "training.micro_batch_size": micro_batch}
                yield {**changes, "parallel.pp_size": stages, "parallel.activation_checkpointing": kept}


def _savers(config: RunConfig) -> list[dict[str, Any]]:
    """What every layout is tried with where none fits without: optimizer state in host memory, then also gradient
    through half as many loops, which changes the training."""
    offload = {"parallel.offload_optimizer": "cpu"}
    depth = config.training.mean_backprop_depth or -(-config.model.mean_recurrence // 2)
    return [{}, offload, {**offload, "training.mean_backprop_depth": -(-depth // 2)}]


def ranked(config: RunConfig, gpus: int, gpu: Gpu, objective: str, *, most: int) -> list[Layout]:
    """The best layouts that fit: by time of a step as built, or by memory. Times come first, as they are quick to find;
    memory is looked at in that order until `most` layouts fit. A layout that has no room is not tried with more."""
    for saver in _savers(config):
        timed = []
        for changes in candidates(config, gpus, gpu):
            if objective == "memory" and changes["parallel.activation_checkpointing"] == "none":
                continue
            try:
                resolved = resolve(with_changes(config, {**changes, **saver}), gpus)
            except ConfigError:
                continue
            timed.append((timing(resolved, gpu), resolved, {**changes, **saver}))
        timed.sort(key=lambda entry: entry[0].serial_s / entry[0].tokens_per_step)
        found: list[Layout] = []
        too_large: list[dict[str, Any]] = []
        for step, resolved, changes in timed:
            if any(_asks_more(changes, other) for other in too_large):
                continue
            layout = Layout(changes, resolved, memory(resolved), step)
            if layout.fits(gpu):
                found.append(layout)
            else:
                too_large.append(changes)
            if len(found) == most and objective == "time":
                break
        if found:
            break
    if objective == "memory":
        found.sort(key=lambda layout: layout.memory.total)
    return found[:most]


def _asks_more(changes: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a layout needs at least the memory of another: all alike, but as many or more rows, and no more
    recomputation."""
    loose = {"training.micro_batch_size", "parallel.activation_checkpointing"}
    alike = all(changes[key] == other[key] for key in changes.keys() - loose)
    recomputes, other_recomputes = (c["parallel.activation_checkpointing"] == "loop" for c in (changes, other))
    more_rows = changes["training.micro_batch_size"] >= other["training.micro_batch_size"]
    return alike and more_rows and (not recomputes or other_recomputes)
