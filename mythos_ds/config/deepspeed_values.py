"""What the keys of the `deepspeed` section hold, checked without DeepSpeed.

It reads most of them only once the model is built, and some not before the first step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mythos_ds.config.error_messages import did_you_mean, show
from mythos_ds.config.schema import RunConfig
from mythos_ds.errors import Coded, Problem

_LARGEST = 2**63 - 1
_MOST_ELEMENTS = 10**11
"""Of a buffer that is allocated whole; 200 GB in bfloat16."""
_ZERO = "zero_optimization"


@dataclass(frozen=True)
class _Kind:
    """Values that a key takes, in words."""

    allowed: str
    takes: Callable[[Any], bool]


def _whole(least: int, most: int = _LARGEST) -> _Kind:
    """Whole numbers; DeepSpeed also takes 5e8 for one."""

    def takes(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return least <= value <= most and value == int(value)

    return _Kind(f"a whole number from {least} to {most}", takes)


def _number(least: float, most: float) -> _Kind:
    def takes(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

    return _Kind(f"a number from {least:g} to {most:g}", takes)


def _word(*words: str) -> _Kind:
    return _Kind(" or ".join(f'"{word}"' for word in words), lambda value: value in words)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_TEXTS = _Kind("a list of texts", _texts)
_DTYPE = _word("fp32", "fp16", "bf16")
_COUNT = _whole(0)
_BUFFER = _whole(1, _MOST_ELEMENTS)

Keys = dict[str, Any]
"""A kind for each key, or the keys of an object."""

_COMPILE_FLAGS = (
    "deepcompile", "autoep_non_moe", "free_activation", "offload_activation", "offload_activation_pin_memory",
    "offload_opt_states", "double_buffer", "symmetric_memory", "debug_log", "offload_parameters", "sync_before_reduce",
    "sync_after_reduce", "sync_before_allgather", "sync_after_allgather", "keep_int_input_tensors",
    "keep_all_input_tensors",
)  # fmt: skip

_ZERO_FLAGS = (
    "allgather_partitions", "contiguous_gradients", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "ignore_unused_parameters", "legacy_stage1", "load_from_fp32_weights",
    "log_trace_cache_warnings", "memory_efficient_linear", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_scatter", "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory", "stage3_allgather_sequential", "stage3_use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
)  # fmt: skip

VALUES: Keys = {
    "aio": {
        "block_size": _whole(1),
        "queue_depth": _whole(1),
        "intra_op_parallelism": _whole(1),
        "single_submit": _FLAG,
        "overlap_events": _FLAG,
        "use_gds": _FLAG,
    },
    "comet": {
        "enabled": _FLAG,
        "samples_log_interval": _whole(1),
        "project": _TEXT,
        "workspace": _TEXT,
        "experiment_name": _TEXT,
        "online": _FLAG,
        "mode": _word("get", "create", "get_or_create"),
    },
    "comms_logger": {"enabled": _FLAG, "prof_all": _FLAG, "prof_ops": _TEXTS, "verbose": _FLAG, "debug": _FLAG},
    "communication_data_type": _DTYPE,
    "compile": {**dict.fromkeys(_COMPILE_FLAGS, _FLAG), "free_activation_threshold": _COUNT, "passes": _TEXTS},
    "csv_monitor": {"enabled": _FLAG, "output_path": _TEXT, "job_name": _TEXT},
    "data_types": {"grad_accum_dtype": _DTYPE, "param_dtype": _DTYPE, "buffer_dtype": _DTYPE,
                   "keep_in_fp32_modules": _Kind('"auto" or a list of texts', lambda v: v == "auto" or _texts(v))},
    "disable_allgather": _FLAG,
    "disable_python_gc": _FLAG,
    "dump_state": _FLAG,
    "flops_profiler": {
        "enabled": _FLAG,
        "recompute_fwd_factor": _number(0, 1e6),
        "profile_step": _whole(1),
        "module_depth": _whole(-1),
        "top_modules": _whole(1),
        "detailed": _FLAG,
        "output_file": _TEXT,
    },
    "gradient_allreduce_op": _word("mean", "sum"),
    "gradient_predivide_factor": _number(1e-6, 1e6),
    "log_level": _word("debug", "info", "warning", "error", "critical"),
    "memory_breakdown": _FLAG,
    "prescale_gradients": _FLAG,
    "seq_parallel_communication_data_type": _DTYPE,
    "steps_per_print": _whole(1),
    "timers": {"throughput": {"enabled": _FLAG, "synchronized": _FLAG}},
    "wall_clock_breakdown": _FLAG,
    "wandb": {"enabled": _FLAG, "group": _TEXT, "team": _TEXT, "project": _TEXT},
    _ZERO: {
        **dict.fromkeys(_ZERO_FLAGS, _FLAG),
        "allgather_bucket_size": _whole(0, _MOST_ELEMENTS),
        "reduce_bucket_size": _BUFFER,
        "sub_group_size": _whole(1),
        "stage3_max_live_parameters": _COUNT,
        "stage3_max_reuse_distance": _COUNT,
        "stage3_model_persistence_threshold": _COUNT,
        "stage3_param_persistence_threshold": _COUNT,
        "stage3_prefetch_bucket_size": _COUNT,
    },
}  # fmt: skip
"""The keys that may be set here, and what they hold; a test compares them with the installed DeepSpeed."""


def check(section: dict[str, Any]) -> list[Problem]:
    """(key path, message) of each value that DeepSpeed would not take; keys that it does not know are not looked at."""
    problems = _wrong(section, VALUES, "deepspeed")
    if _enabled(section, "wandb"):
        # DeepSpeed's writer ends the run where no key is known or no server reached, on the rank that writes alone.
        message = "true given; allowed: false; log there by monitor.wandb=PROJECT, which goes on without key or server"
        problems.append(("deepspeed.wandb.enabled", Coded("MDS155", message)))
    if _enabled(section, "comet") and find_spec("comet_ml") is None:
        message = "true given, and comet_ml is not installed: pip install comet_ml, or false"
        problems.append(("deepspeed.comet.enabled", Coded("MDS155", message)))
    return problems


def _enabled(section: dict[str, Any], name: str) -> bool:
    writer = section.get(name)
    return isinstance(writer, dict) and writer.get("enabled") is True


def _wrong(section: dict[str, Any], known: Keys, at: str) -> list[Problem]:
    problems: list[Problem] = []
    for key, value in section.items():
        kind, here = known.get(key), f"{at}.{key}"
        if value is None:
            continue
        if isinstance(kind, _Kind):
            if not kind.takes(value):
                problems.append((here, Coded("MDS154", f"{show(value)} given; allowed: {kind.allowed}")))
        elif kind is not None and not isinstance(value, dict):
            problems.append((here, Coded("MDS154", f"{show(value)} given; allowed: an object")))
        elif kind is not None:
            problems += _wrong(value, kind, here)
        elif known is not VALUES and known is not VALUES[_ZERO]:
            hint = did_you_mean(key, known) or "; allowed: " + ", ".join(known)
            problems.append((here, Coded("MDS153", f"unknown to DeepSpeed{hint}")))
    return problems


def check_together(config: RunConfig) -> list[Problem]:
    """(key path, message) of settings that DeepSpeed refuses with others of the run, once the model is built."""
    section, stage = config.deepspeed, config.parallel.zero_stage
    zero = section.get(_ZERO)
    zero = zero if isinstance(zero, dict) else {}
    problems: list[Problem] = []
    if stage in (2, 3) and zero.get("reduce_scatter") is not False:
        why = f"with zero_stage {stage} and zero_optimization.reduce_scatter"
        if section.get("gradient_predivide_factor") not in (None, 1):
            factor = section["gradient_predivide_factor"]
            message = Coded("MDS156", f"{factor} given {why}; allowed: 1; nearest: 1")
            problems.append(("deepspeed.gradient_predivide_factor", message))
        if section.get("prescale_gradients") is True:
            message = Coded("MDS156", f"true given {why}; allowed: false; nearest: false")
            problems.append(("deepspeed.prescale_gradients", message))
    if stage == 3 and section.get("gradient_allreduce_op") == "sum":
        message = Coded("MDS157", '"sum" given with zero_stage 3; allowed: "mean"')
        problems.append(("deepspeed.gradient_allreduce_op", message))
    if config.parallel.ep_size != 1:
        if stage == 2 and zero.get("contiguous_gradients") is False:
            message = Coded("MDS158", "false given with experts and zero_stage 2")
            problems.append((f"deepspeed.{_ZERO}.contiguous_gradients", message))
        if stage in (1, 2) and zero.get("reduce_scatter") is False:
            message = Coded("MDS158", f"false given with experts and zero_stage {stage}")
            problems.append((f"deepspeed.{_ZERO}.reduce_scatter", message))
    return problems
