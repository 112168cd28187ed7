"""The proxy of a run: the same structure at laptop size, so that every preset can be executed."""

import math
from collections.abc import Sequence
from typing import Any

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.divisors import largest_divisor
from mythos_ds.config.layout import PipelineSize, expert_stage_size
from mythos_ds.config.rules.check import BUILTIN_VOCABULARY, steps_of
from mythos_ds.config.schema import BatchRamp, DatasetConfig, ModelConfig, RunConfig, TrainingConfig
from mythos_ds.config.training_stages import STAGES, TrainingStage

DIM = 64
MAX_SEQ_LEN = 1024
"""A step of longer sequences takes minutes."""
EXPERTS = 32
SEQ_LEN = 64
HEADS = 4
STEPS = 20
"""Of the whole run."""
_MLA_WIDTHS = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_LORA_RANK = 4
_ACCUMULATION = 2


def make_proxies(
    stages: Sequence[TrainingStage], world_size: int, file: Sequence[TrainingStage]
) -> tuple[tuple[TrainingStage, ...], list[str]]:
    """`make_proxy` of some of the training stages of a file, all of which take about STEPS steps together; one line per
    changed setting, which names the stage where that differs from the one before it."""
    made: list[TrainingStage] = []
    told: list[str] = []
    for stage in stages:
        small, lines = make_proxy(stage.config, world_size, file[0].config.training.seq_len, STEPS // len(file) or 1)
        made.append(TrainingStage(stage.name, small))
        prefix = f"proxy: {STAGES}.{stage.name}." if len(made) > 1 else "proxy: "
        told += [line.replace("proxy: ", prefix, 1) for line in lines if line not in told]
    return tuple(made), told


def make_proxy(
    config: RunConfig, world_size: int, first_seq_len: int | None = None, steps: int = STEPS
) -> tuple[RunConfig, list[str]]:
    """A small run of the same structure on the processes at hand, and one printable line per changed setting.

    Kept: recurrent layers, max_loops and the depth distribution, attention type, top-k, shared experts, the
    ratio expert_dim / dim, ZeRO stage, injection, optimizer. Changed: widths, expert count, sequence length,
    data, length; degrees of parallelism that do not fit the processes. A training stage keeps the ratio of its
    sequences to `first_seq_len`, those of the run's first stage (None: it is the first), up to MAX_SEQ_LEN.
    """
    share = SEQ_LEN / (first_seq_len or config.training.seq_len)
    sections = config.model_dump(exclude_unset=True)
    pp_size = _pipeline(config, world_size)
    changes: dict[str, dict[str, Any]] = {
        "model": _model_changes(config, pp_size, share),
        "parallel": _parallel_changes(config, world_size, pp_size),
        "training": _training_changes(config, world_size, pp_size, share, steps),
        "data": {"corpus": "builtin", "datasets": None, "tokenizer": None},
        "checkpoint": {"interval": 0},
        "monitor": {"log_interval": 1, "sample_tokens": 8},
    }
    lines: list[str] = []
    for name, settings in changes.items():
        before = getattr(config, name)
        for key, value in settings.items():
            old = getattr(before, key)
            if old != value:
                lines.append(f"proxy: {name}.{key}: {_brief(old)} -> {_brief(value)}")
                sections.setdefault(name, {})[key] = value
    if sections.pop("cluster", None) is not None:
        lines.append(f"proxy: cluster: removed (this is {world_size} process{'es' if world_size > 1 else ''})")
    return RunConfig.model_validate(sections), lines


def _brief(value: Any) -> str:
    is_data = isinstance(value, list) and any(isinstance(item, DatasetConfig) for item in value)
    return f"{len(value)} datasets" if is_data else str(value)


def _pipeline(config: RunConfig, world_size: int) -> PipelineSize:
    """pp_size as it fits the processes: the largest divisor up to the one asked for, or [a, b, c] if that is all."""
    asked = config.parallel.pp_size
    if isinstance(asked, list):
        return asked if sum(asked) == world_size else 1
    fitting = math.gcd(config.model.recurrent_layers, world_size)
    return largest_divisor(fitting, asked)


def _model_changes(config: RunConfig, pp_size: PipelineSize, share: float) -> dict[str, Any]:
    model = config.model
    layers = pp_size if isinstance(pp_size, int) else 1
    changes: dict[str, Any] = {
        "vocab_size": BUILTIN_VOCABULARY,
        "dim": DIM,
        "prelude_layers": layers,
        "coda_layers": min(layers, model.coda_layers),
        "n_heads": HEADS,
        "ffn_dim": _scaled(model.ffn_dim, model.dim),
        "n_experts": EXPERTS,
        "n_experts_per_tok": min(model.n_experts_per_tok, EXPERTS),
        "expert_dim": _scaled(model.expert_dim, model.dim),
        "lora_rank": min(model.lora_rank, _LORA_RANK),
    }
    if model.rope_scaling is not None and model.rope_scaling.original_max_position_embeddings is not None:
        original = max(1, round(model.rope_scaling.original_max_position_embeddings * share))
        changes["rope_scaling"] = model.rope_scaling.model_copy(update={"original_max_position_embeddings": original})
    if model.no_rope_layers:
        changes["no_rope_layers"] = _without_rope(model, layers, changes["coda_layers"])
    if model.shared_expert_dim is not None:
        changes["shared_expert_dim"] = _scaled(model.shared_expert_dim, model.dim)
    if model.attn_type == "mla":
        changes.update({key: width for key, width in _MLA_WIDTHS.items() if getattr(model, key) is not None})
    else:
        ratio = model.n_heads // model.resolved_kv_heads
        changes.update(n_kv_heads=max(1, HEADS // ratio), head_dim=None)
    if model.n_expert_groups is not None and model.n_limited_groups is not None:
        groups = math.gcd(model.n_expert_groups, EXPERTS // 2)  # of two or more: a group is chosen for its two best
        needed = -(-changes["n_experts_per_tok"] * groups // EXPERTS)
        changes.update(n_expert_groups=groups, n_limited_groups=max(needed, min(model.n_limited_groups, groups)))
    return changes


def _without_rope(model: ModelConfig, prelude: int, coda: int) -> tuple[int, ...]:
    """no_rope_layers of the model where it has so many layers in prelude and coda."""
    loop, last = prelude, prelude + model.recurrent_layers
    kept = [layer for layer in range(min(prelude, model.prelude_layers)) if not model.rotates("prelude", layer)]
    kept += [loop + layer for layer in range(model.recurrent_layers) if not model.rotates("recurrent", layer)]
    return (*kept, *(last + layer for layer in range(coda) if not model.rotates("coda", layer)))


def _scaled(width: int, dim: int) -> int:
    """`width` at the proxy's dim, to the next multiple of 8."""
    return max(8, 8 * round(width * DIM / dim / 8))


def _parallel_changes(config: RunConfig, world_size: int, pp_size: PipelineSize) -> dict[str, Any]:
    ep_size, own = config.parallel.ep_size, _expert_ranks(config, world_size, pp_size)
    changes: dict[str, Any] = {"pp_size": pp_size, "ep_size": ep_size if ep_size == "auto" else own}
    if config.parallel.dispatch in ("per_rank", "per_node", "deepep"):  # the processes of a proxy share one node
        changes["dispatch"] = "per_rank" if own > 1 else "all_to_all"
    if config.parallel.dispatch_dtype == "fp8" and own == 1:
        changes["dispatch_dtype"] = "training"
    if config.parallel.overlap:
        changes["overlap"] = own > 1
    return changes


def _expert_ranks(config: RunConfig, world_size: int, pp_size: PipelineSize) -> int:
    """Counts the processes that share the proxy's experts."""
    ep_size = config.parallel.ep_size
    fitting = math.gcd(EXPERTS, expert_stage_size(pp_size, world_size))
    most = (fitting if config.parallel.zero_stage else 1) if ep_size == "auto" else ep_size
    return largest_divisor(fitting, most)


def _training_changes(
    config: RunConfig, world_size: int, pp_size: PipelineSize, share: float, steps: int
) -> dict[str, Any]:
    training, holders = config.training, expert_stage_size(pp_size, world_size)
    steps = min(training.max_steps or steps, steps)
    rows = 1
    if isinstance(pp_size, list):
        accumulation = len(pp_size)
        rows = math.lcm(*(size // math.gcd(size, holders) for size in pp_size))
    elif pp_size > 1:
        accumulation = max(_ACCUMULATION, pp_size)
    else:
        unit = training.micro_batch_size * world_size
        accumulation = min(_ACCUMULATION, max(1, training.global_batch_size // unit))
    if config.parallel.overlap and _expert_ranks(config, world_size, pp_size) > 1:
        rows *= 2  # one for each lane
    ramp = None
    if training.global_batch_ramp is not None:
        accumulation = 1 if pp_size == 1 else accumulation
        ramp = _ramp(training, training.global_batch_ramp.samples, rows * holders * accumulation, steps)
    return {
        "seq_len": min(MAX_SEQ_LEN, max(2, round(training.seq_len * share))),
        "micro_batch_size": rows,
        "global_batch_size": rows * holders * accumulation * (2 if ramp else 1),
        "global_batch_ramp": ramp,
        "max_steps": steps,
        "max_tokens": None,
        "init_from": None,  # weights of the whole size do not fit
        # a layer or an expert by its number may not be there
        "frozen": [name for name in training.frozen if not any(character.isdigit() for character in name)],
        "warmup_steps": min(training.warmup_steps, steps // 10),
        "depth_curriculum_steps": min(training.depth_curriculum_steps, steps // 2),
        "eval_interval": 0,
        "eval_deep_every": 1,
        "eval_batches": 1,
    }


def _ramp(training: TrainingConfig, samples: int, start: int, steps: int) -> BatchRamp:
    """From `start` to twice as many sequences, over the share of `steps` that `samples` are of the whole run's."""
    whole = BatchSchedule.of(training).samples(steps_of(training))
    share = min(1.0, samples / max(1, whole))
    return BatchRamp(start=start, increment=start, samples=max(1, round(share * steps * start)))
