"""Simulate one rank of a large run on a laptop: what it holds and sends, and which ranks it communicates with.

    mythos-ds rehearse --config 1t.json --rank 777
    mythos-ds rehearse --config 1t.json --rank 777 --stage anneal
    mythos-ds rehearse --config 1t.json --gpus 1024 --rank 0 --json parallel.pp_size=4 parallel.ep_size=256

Builds all process groups of the run under a pretended back end, this rank's modules on the meta device, and its
schedule. No GPU, no other process, no memory for weights.
"""

import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, planned_world_size, resolve_stages, starts_of
from mythos_ds.config.training_stages import index_of
from mythos_ds.errors import ConfigError, OptionError
from mythos_ds.formatting import byte_text
from mythos_ds.mains import run_tool

_DEFAULT_NODE = 8


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--config", required=True)
    made.add_argument("--rank", type=int, required=True)
    made.add_argument("--gpus", type=int, help="default: those of the configuration's cluster")
    made.add_argument(
        "--step",
        type=int,
        help="optimizer step of the run whose loops and samples are shown (default: the first)",
    )
    made.add_argument("--stage", metavar="NAME", help="training stage; default: the one that has --step, or the first")
    made.add_argument("--json", action="store_true")
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    return made


def work(arguments: Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    loaded = load_config(arguments.config, arguments.overrides)
    config = loaded.config
    gpus = planned_world_size(config) if arguments.gpus is None else arguments.gpus
    if gpus < 1:
        raise OptionError(f"--gpus: given {gpus}; allowed: 1 or more; nearest: 1")
    if not 0 <= arguments.rank < gpus:
        nearest = min(max(arguments.rank, 0), gpus - 1)
        raise OptionError(f"--rank: given {arguments.rank}; allowed: 0 .. {gpus - 1}; nearest: {nearest}")
    if arguments.step is not None and arguments.step < 0:
        raise OptionError(f"--step: given {arguments.step}; allowed: 0 or more; nearest: 0")
    if config.parallel.zero_stage != 3:
        raise ConfigError(f"parallel.zero_stage: given {config.parallel.zero_stage}; a rehearsal is of 3")
    named = None if arguments.stage is None else index_of(arguments.stage, loaded.stages, loaded.path)
    stages = resolve_stages(loaded.stages, gpus)
    index, step = place(stages, named, arguments.step)
    from mythos_ds.plan.rehearsal import rehearse  # torch and DeepSpeed, which wrong arguments need not wait for

    per_node = min(config.cluster.gpus_per_node if config.cluster else _DEFAULT_NODE, gpus)
    found = rehearse(stages[index].run, arguments.rank, per_node, step, starts_of(stages)[index])
    if loaded.stages[0].name is not None:
        found = {"training_stage": loaded.stages[index].name, **found}
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write("\n".join(lines(found)) + "\n")


def place(stages: Sequence[ResolvedStage], named: int | None, step: int | None) -> tuple[int, int]:
    """Number of the training stage and step of the run. Raises ConfigError for a step that the named stage has not."""
    first = [start.step for start in starts_of(stages)]
    if named is None:
        step = step or 0
        return bisect_right(first, step) - 1, step
    if step is None:
        return named, first[named]
    last = first[named] + stages[named].run.max_steps - 1
    if not first[named] <= step <= last:
        nearest = min(max(step, first[named]), last)
        allowed = f"{first[named]} .. {last} in --stage {stages[named].name}"
        raise OptionError(f"--step: given {step}; allowed: {allowed}; nearest: {nearest}")
    return named, step


def lines(found: dict[str, Any]) -> list[str]:
    """The rehearsal for people."""
    layers = ", ".join(f"{name} {span(numbers)}" for name, numbers in found["layers"].items() if numbers)
    kept, sent = found["state_bytes"], found["traffic_bytes"]
    first, last = found["stage_ranks"]
    group, copies = found["expert_group"], found["expert_copies"]
    shown = [
        *([f"training stage {found['training_stage']}"] if "training_stage" in found else []),
        f"rank {found['rank']}: node {found['node']}, GPU {found['local_rank']}, stage {found['stage']} ({layers})",
        f"weights and gradients with ranks {first}-{last}",
        f"experts {span(found['experts'])} of each looped layer" if found["experts"] else "no experts",
        f"exchanges tokens with {len(group)} ranks, {span(group)}" if group else "keeps its tokens",
        f"shares these experts with {len(copies)} ranks, {', '.join(map(str, copies[:4]))}{' ...' * (len(copies) > 4)}",
        f"{found['parameters_before_zero']:,} parameters before ZeRO-3 cuts them; keeps "
        + ", ".join(f"{name} {byte_text(size)}" for name, size in kept.items()),
        f"step {found['step']}: {found['n_loops']} loops, {found['n_grad_loops']} with gradient; "
        f"{found['micro_batches']} micro-batches of {found['rows_per_micro_batch']} sequences; samples "
        f"{span(found['samples_of_the_step'])} over all ranks",
        "sends: " + ", ".join(f"{name} {byte_text(size)}" for name, size in sent.items() if size),
    ]
    if found["actions"]:
        shown.append("schedule: " + ", ".join(f"{count} x {name}" for name, count in found["actions"].items()))
    return shown


def span(numbers: list[int]) -> str:
    """First and last."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
