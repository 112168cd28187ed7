"""The `deepspeed` section: keys that DeepSpeed 0.19 knows, keys that this stack derives, and the final
config.

DeepSpeed silently ignores a misspelt top-level key, so the keys are checked here. The lists are what its
config classes read (runtime/config.py, runtime/zero/config.py); a test compares them with the installed
DeepSpeed.
"""

import copy
from typing import Any

from mythos_ds.config.error_messages import did_you_mean
from mythos_ds.config.layout import is_pipelined
from mythos_ds.config.schema import RunConfig
from mythos_ds.errors import Coded, Problem

# Larger than any run: the progress line is ours.
_NO_PRINTS = 10**9

KNOWN_KEYS = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency",
    "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc",
    "dump_state", "expert_parallel", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor", "hybrid_engine",
    "log_level", "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline",
    "prescale_gradients", "scheduler", "seq_parallel_communication_data_type", "steps_per_print",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip

KNOWN_ZERO_KEYS = (
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients",
    "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "legacy_stage1",
    "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear",
    "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
)  # fmt: skip

# Written once elsewhere in the run's file.
DERIVED_KEYS = {
    "train_batch_size": "set training.global_batch_size",
    "train_micro_batch_size_per_gpu": "set training.micro_batch_size",
    "gradient_accumulation_steps": "it follows from training.global_batch_size",
    "managed_gradient_accumulation": "it follows from training.global_batch_size",
    "gradient_clipping": "set training.grad_clip",
    "bf16": "set training.dtype",
    "bfloat16": "set training.dtype",
    "fp16": "set training.dtype (bfloat16 or float32)",
    "torch_autocast": "set training.dtype",
    "optimizer": "set training.optimizer, lr, beta1, beta2, eps, weight_decay",
    "scheduler": "set training.schedule, warmup_steps, decay_fraction, min_lr_ratio",
    "zero_allow_untested_optimizer": "it follows from training.optimizer",
    "zero_force_ds_cpu_optimizer": "it follows from parallel.offload_optimizer",
    "expert_parallel": "set parallel.ep_size",
    "activation_checkpointing": "set parallel.activation_checkpointing",
    "tensorboard": "set monitor.tensorboard",
    "zero_optimization.stage": "set parallel.zero_stage",
    "zero_optimization.offload_optimizer": "set parallel.offload_optimizer",
    "zero_optimization.offload_param": "set parallel.offload_params",
    "zero_optimization.cpu_offload": "set parallel.offload_optimizer",
    "zero_optimization.cpu_offload_param": "set parallel.offload_params",
    "zero_optimization.leaf_module": "the looped block and each dense layer are the leaves",
}

# Known to DeepSpeed, but wrong, refused or without effect in this stack.
UNSUPPORTED_KEYS = {
    "autotuning": "the layout is planned, not searched for",
    "checkpoint": "saves are checksummed and published by this stack",
    "datastates_ckpt": "saves are checksummed and published by this stack",
    "zero_optimization.compute_grad_norm": "the gradient norm is always reported",
    "zero_optimization.zenflow": "steps are synchronous",
    "data_efficiency": "the data pipeline is not DeepSpeed's",
    "dataloader_drop_last": "the data pipeline is not DeepSpeed's",
    "hybrid_engine": "this stack has no generation engine of DeepSpeed",
    "pipeline": "DeepSpeed's pipeline engine refuses ZeRO 2 and 3",
    "tensor_parallel": "expert parallelism under ZeRO-3 does not combine with it",
    "use_data_before_expert_parallelism": "expert-parallel ranks are consecutive",
    "weight_quantization": "it is for inference",
    "vocabulary_size": "model.vocab_size is the only one",
    "zero_optimization.zero_hpz_partition_size": "DeepSpeed refuses it with expert parallelism under ZeRO-3",
    "zero_optimization.zero_quantized_gradients": "DeepSpeed refuses it with expert parallelism under ZeRO-3",
    "zero_optimization.stage3_module_granularity_threshold": "it makes leaves of modules that are looped",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "expert-parallel checkpoints are sharded",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "expert-parallel checkpoints are sharded",
}

# DeepSpeed raises for these; removed between 0.16 and 0.19.
REMOVED_KEYS = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity",
    "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention",
    "sparse_gradients", "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.mics_shard_size", "zero_optimization.zeropp_loco_param",
)  # fmt: skip

ZERO = "zero_optimization"


def check(section: dict[str, Any]) -> list[Problem]:
    """(key path, message) of each key that DeepSpeed does not know, or that must not be set here."""
    problems = [_key_problem(key, KNOWN_KEYS, "") for key in section]
    zero = section.get(ZERO)
    if zero is None:
        zero = {}
    if isinstance(zero, dict):
        problems += [_key_problem(key, KNOWN_ZERO_KEYS, f"{ZERO}.") for key in zero]
    else:
        problems.append((f"deepspeed.{ZERO}", Coded("MDS154", f"{zero!r} given; allowed: an object")))
    return [problem for problem in problems if problem is not None]


def _key_problem(key: str, known: tuple[str, ...], prefix: str) -> Problem | None:
    name = prefix + key
    where = f"deepspeed.{name}"
    if name in DERIVED_KEYS:
        return where, Coded("MDS150", f"must not be set here: {DERIVED_KEYS[name]}")
    if name in UNSUPPORTED_KEYS:
        return where, Coded("MDS151", f"is not supported: {UNSUPPORTED_KEYS[name]}")
    if name in REMOVED_KEYS:
        return where, Coded("MDS152", "was removed from DeepSpeed; remove it")
    if key in known:
        return None
    taken = {*DERIVED_KEYS, *UNSUPPORTED_KEYS}
    free = [candidate for candidate in known if prefix + candidate not in taken]
    hint = did_you_mean(key, free) or did_you_mean(key, known)
    return where, Coded("MDS153", f"unknown to DeepSpeed, which would ignore it{hint}")


def build(config: RunConfig, gradient_accumulation_steps: int) -> dict[str, Any]:
    """The configuration DeepSpeed gets: the user's section plus what follows from the rest of the run.

    There is no optimizer section: the engine hands DeepSpeed a torch optimizer, so no operator is compiled.
    """
    training, parallel = config.training, config.parallel
    merged: dict[str, Any] = {"steps_per_print": _NO_PRINTS, **_without_nulls(config.deepspeed)}
    if training.dtype == "bfloat16":
        # DeepSpeed's default is the weights' type: a ring over many ranks would round the sum at each of them.
        merged.setdefault("communication_data_type", "fp32")
    zero = {**_zero_defaults(config), **merged.get(ZERO, {}), "stage": parallel.zero_stage}
    if training.optimizer == "muon":
        # Stage 3 orthogonalises whole gradients; stages 1 and 2 reduce experts' gradients wrongly without it.
        zero["reduce_scatter"] = parallel.zero_stage != 3
    if parallel.offload_optimizer == "cpu":
        # Otherwise DeepSpeed insists on its own CPU Adam, which it compiles at run time.
        merged["zero_force_ds_cpu_optimizer"] = False
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if parallel.offload_params == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    if is_pipelined(parallel):
        gradient_accumulation_steps = 1  # the schedule accumulates
        zero["stage3_param_persistence_threshold"] = 0  # a stage's weights are gathered and released as one
        merged["checkpoint"] = {"tag_validation": "Ignore"}  # each stage has a folder of its own
    merged.update(
        train_micro_batch_size_per_gpu=training.micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_clipping=training.grad_clip,
        bf16={"enabled": training.dtype == "bfloat16"},
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
    )
    return merged


def _without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    """A deep copy; null means that a key is absent, at any level (DeepSpeed refuses most of them)."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in section.items()
        if value is not None
    }


def _zero_defaults(config: RunConfig) -> dict[str, Any]:
    """Defaults that the user's section may change."""
    if config.parallel.zero_stage < 3:
        return {}
    # Vectors (norms, gains, A, B) are not worth a gather each; matrices are, in small models too.
    # The weights of a leaf stay gathered: DeepSpeed's own linear would save nothing, at five times the calls' time.
    return {"stage3_param_persistence_threshold": 4 * config.model.dim, "memory_efficient_linear": False}
