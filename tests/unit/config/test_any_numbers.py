"""Any number in any setting: a plan, or a message that names the key, at once and without memory that grows with it."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from mythos_ds.config.error_messages import section_type
from mythos_ds.config.loader import load_config
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.costs.dry_run import dry_run_report
from mythos_ds.errors import ConfigError
from tests.helpers.time_limit import at_most

HOLDS = "deepspeed.zero_optimization.stage3_param_persistence_threshold=null"
MLA = ["model.attn_type=mla", "model.n_kv_heads=null", "model.qk_norm=false", "model.q_lora_rank=32",
       "model.kv_lora_rank=32", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8",
       "model.v_head_dim=16"]  # fmt: skip
BASES: dict[str, tuple[list[str], int]] = {
    "tiny": ([], 1),
    "mla": (MLA, 1),
    "ring": (["model.recurrent_layers=4", "parallel.pp_size=2", HOLDS], 4),
    "stages": (["parallel.pp_size=[1,2,1]", HOLDS], 4),
    "cluster": (["cluster.gpu=h200", "cluster.nodes=2", "cluster.gpus_per_node=2", "training.global_batch_size=64"], 4),
    "deepest": (["model.max_loops=4096", "model.mean_recurrence=1000", "training.depth_curriculum_steps=100",
                 "training.depth_per=sequence"], 1),
    "ramped": (["training.micro_batch_size=1", 'training.global_batch_ramp={"start":2,"increment":2,"samples":20}'], 1),
    "scaled": (["model.rope_scaling.rope_type=yarn", "model.rope_scaling.factor=8",
                "model.rope_scaling.original_max_position_embeddings=64", "model.n_expert_groups=2",
                "model.n_limited_groups=1"], 1),
}  # fmt: skip
WHOLE = [0, 1, 2, 3, 7, -1, 4096, 10_000, 2**20, 999_983, 2**31 - 1, 2**31, 2**63, 10**12, 10**18, 10**60]
FRACTIONS = [
    "0.0",
    "0.5",
    "1.5",
    "-0.0",
    "5e-324",
    "1e-300",
    "1e6",
    "1e30",
    "1e300",
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
]
VALUES = [*map(str, WHOLE), *FRACTIONS, "9" * 5000, "null", "true", '"7"', "[1]", "[[1]]", "{}"]
LIMIT_S = 2.0


def numeric_keys() -> list[str]:
    """Every setting of the schema that takes a number or a list of them."""
    return sorted(_numeric(RunConfig, ""))


def _numeric(model: Any, at: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = section_type(field.annotation)
        if section is not None and "list" not in str(field.annotation):
            yield from _numeric(section, f"{at}{name}.")
        elif any(kind in str(field.annotation) for kind in ("int", "float")):
            yield f"{at}{name}"


KEYS = [*numeric_keys(), "deepspeed.zero_optimization.reduce_bucket_size", "deepspeed.gradient_predivide_factor",
        "deepspeed.steps_per_print"]  # fmt: skip


def outcome(base: str, overrides: list[str], world_size: int | None = None) -> str:
    """The dry run's report, or the message of a ConfigError. Everything else is raised."""
    settings, processes = BASES[base]
    try:
        with at_most(LIMIT_S, (base, [override[:80] for override in overrides])):
            config = load_config("tiny", [*settings, *overrides]).config
            if world_size == 0:
                config, _ = make_proxy(config, processes)
            elif config.cluster is not None:
                processes = planned_world_size(config)
            resolved = resolve(config, world_size or processes)
            json.dumps(resolved.as_dict())
            return dry_run_report(resolved)
    except ConfigError as error:
        problems = error.problems
    assert all(len(problem) < 700 for problem in problems), problems
    return "\n".join(problems)


def test_the_schema_was_walked():
    assert len(KEYS) > 80
    assert {"model.dim", "training.lr", "data.split", "cluster.nodes", "model.rope_scaling.factor"} <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_any_number_is_planned_or_refused_by_its_key(key):
    for value in VALUES:
        base = "cluster" if key.startswith("cluster") else "scaled" if "rope_scaling" in key else "tiny"
        base = "ramped" if "ramp" in key else base
        said = outcome(base, [f"{key}={value}"])
        named = key.rpartition(".")[2] in said or "the run's" in said or "processes" in said
        # Of a length that other settings exceed, and of a cluster, what follows from it is named.
        assert "parameters" in said or named, (key, value[:80], said)


@pytest.mark.parametrize("base", BASES)
def test_pairs_of_numbers(base):
    generator = random.Random(base)
    for _ in range(60):
        keys = generator.sample(KEYS, generator.choice([2, 3]))
        world_size = generator.choice([None, None, 0, 1, 1024, 10**7, 10**12])
        outcome(base, [f"{key}={generator.choice(VALUES)}" for key in keys], world_size)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.n_experts=1048576", "parallel.ep_size=auto"],
        ["training.global_batch_size=2147483646", "training.micro_batch_size=2"],
        ["model.max_loops=4096", "model.mean_recurrence=4000"],
        ["model.n_experts=1000000", "parallel.ep_size=3"],
        ["training.max_steps=1000000000000"],
    ],
)
def test_memory_does_not_grow_with_experts_batch_or_steps(overrides):
    tracemalloc.start()
    try:
        outcome("tiny", overrides)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60e6, peak
