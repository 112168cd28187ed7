"""What `--dry-run` and `--print-config` say about a run, without torch."""

import json

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import BatchRamp, RunConfig, TrainingConfig
from mythos_ds.config.starting_model import is_here
from mythos_ds.costs.flops import cache_bytes_per_token, expected_flops_per_token, flops_per_token, mean_training_depth
from mythos_ds.costs.params import count_parameters
from mythos_ds.costs.pipeline import computations, predict, sent_bytes, visits_of
from mythos_ds.formatting import number_text

_LABEL_WIDTH = 18
_QUICKLY_SIMULATED = 100_000
"""Computations of a pipeline's step that take well below a second."""


def dry_run_report(resolved: ResolvedRun, held_out: str | None = None) -> str:
    """Layout, batch, parameters, FLOPs, cache and the DeepSpeed configuration, as text.

    held_out: how much validation text there is, where that is known.
    """
    validation = ("validation", _validation(resolved.config, held_out))
    lines = [f"{label:<{_LABEL_WIDTH}}{text}" for label, text in (*_layout(resolved), validation, *_size(resolved))]
    deepspeed = json.dumps(resolved.deepspeed, indent=2, sort_keys=True)
    return "\n".join([*lines, "DeepSpeed configuration:", deepspeed])


def _layout(resolved: ResolvedRun) -> list[tuple[str, str]]:
    config, ep_size, world = resolved.config, resolved.ep_size, resolved.world_size
    training, model, zero = config.training, config.model, config.parallel.zero_stage
    tokens, ramp = resolved.total_tokens, training.global_batch_ramp
    matrix_lr = training.lr * training.lr_reference_dim / model.dim
    accumulation = resolved.gradient_accumulation_steps
    pipelined = len(resolved.stages) > 1
    holders = resolved.layout(0).expert_stage_size
    copies = holders // ep_size
    what = "micro-batches" if pipelined else "accumulation"
    split = f"{training.micro_batch_size} x {holders} processes x {accumulation} {what}"
    return [
        ("processes", f"{world}: expert parallel {ep_size} x {copies} expert copies, ZeRO {zero}"),
        *(_pipeline(resolved) if pipelined else ()),
        ("experts", f"{model.n_experts // ep_size} of {model.n_experts} per process and layer"),
        ("batch", f"{training.global_batch_size} sequences = {split} = {resolved.tokens_per_step:,} tokens"),
        *([("batch ramp", _ramp(ramp))] if ramp else ()),
        ("length", f"{resolved.max_steps:,} steps = {number_text(tokens)} tokens, sequences of {training.seq_len}"),
        (
            "optimizer",
            f"{training.optimizer}, lr {training.lr:g} (matrices {matrix_lr:.3g}), {training.dtype}",
        ),
        *([("weights", _weights(training.init_from))] if training.init_from else ()),
        *([("frozen", ", ".join(training.frozen))] if training.frozen else ()),
        ("schedule", f"{training.schedule}, {training.warmup_steps} warm-up steps"),
        ("loops", f"mean {mean_training_depth(config, resolved.grows_from):.2f}, at most {model.max_loops}"),
        ("drawn from", _depth_law(training, resolved.grows_from)),
        ("gradient", f"through the last {resolved.mean_backprop_depth} loops"),
    ]


def _validation(config: RunConfig, held_out: str | None) -> str:
    data = config.data
    if not data.validates:
        return "none: no held-out loss is computed"
    train, valid, test = data.used_split
    own = ", ".join(dataset.prefix for dataset in data.own_validation)
    text = f"of its own: {own}" if own else f"{valid / (train + valid + test):.2%} of the documents"
    return f"{text}; {held_out}" if held_out else text


def _weights(source: str) -> str:
    return f"from {source}" if is_here(source) else f"from {source}, which is not here and was not looked at"


def _ramp(ramp: BatchRamp) -> str:
    return f"from {ramp.start} sequences by {ramp.increment} over the first {ramp.samples:,}"


def _depth_law(training: TrainingConfig, grows_from: int) -> str:
    growing = training.depth_curriculum_steps
    return (
        training.depth_distribution
        + (", for each sequence; a step runs the largest" if training.depth_per == "sequence" else "")
        + (f"; its mean grows from {grows_from} over {growing:,} steps" if growing else "")
    )


def _pipeline(resolved: ResolvedRun) -> list[tuple[str, str]]:
    """One line per stage, and what the schedule costs at the mean depth."""
    mean = resolved.config.model.mean_recurrence
    simulated = computations(resolved, mean) <= _QUICKLY_SIMULATED
    prediction = predict(resolved, mean) if simulated else None
    sent = sent_bytes(visits_of(resolved, mean), resolved.gradient_accumulation_steps)
    rows = []
    for index, stage in enumerate(resolved.stages):
        layers = [
            f"{name} {_span(numbers)}"
            for name, numbers in (
                ("prelude", stage.part.prelude),
                ("recurrent", stage.part.recurrent),
                ("coda", stage.part.coda),
            )
            if numbers
        ]
        ends = [*(["embedding"] if stage.part.embeds else []), *layers, *(["head"] if stage.part.predicts else [])]
        ranks = _span((stage.first_rank, stage.first_rank + stage.size - 1)[: stage.size])
        text = f"ranks {ranks}: {', '.join(ends)}; rows per micro-batch {stage.rows}"
        held = f"keeps {number_text(prediction.peak_held_bytes[index])}B of messages, " if prediction else ""
        text += f"; {held}sends {number_text(sent[index])}B per step"
        rows.append((f"stage {index}", text))
    if prediction is None:
        return [*rows, ("idle share", "not simulated: stages and loops are too many for a dry run")]
    return [*rows, ("idle share", f"{prediction.bubble:.1%} of a step at {mean} loops, by simulation")]


def _span(numbers: tuple[int, ...]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _size(resolved: ResolvedRun) -> list[tuple[str, str]]:
    config = resolved.config
    model, counts = config.model, count_parameters(config.model)
    mean = expected_flops_per_token(config, resolved.mean_backprop_depth, resolved.grows_from)
    full = flops_per_token(model, context=config.training.seq_len, n_loops=model.max_loops)
    tokens = resolved.total_tokens
    depths = (model.mean_recurrence, model.max_loops)
    cache = [f"{number_text(cache_bytes_per_token(model, loops))}B at {loops} loops" for loops in depths]
    return [
        ("parameters", f"{counts.total:,}, of them {counts.routed:,} in routed experts"),
        ("active", f"{counts.active:,} per token ({counts.active_share:.1%})"),
        (
            "FLOPs per token",
            f"{number_text(mean.training)} in training at mean depth + {number_text(mean.recompute)} recompute",
        ),
        ("at full depth", f"{number_text(full.training)} (T = {model.max_loops}, gradient through all loops)"),
        ("FLOPs of the run", number_text(mean.training * tokens)),
        ("cache per token", ", ".join(cache)),
    ]
