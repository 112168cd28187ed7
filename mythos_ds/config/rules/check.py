"""Rules between settings that a configuration must keep, as data: the key and what breaks the rule."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from mythos_ds.config import deepspeed_section, deepspeed_values
from mythos_ds.config.batch_ramp import MAX_SIZES, BatchSchedule
from mythos_ds.config.depth_distribution import deep_shares, depth_pmf
from mythos_ds.config.dispatch import known_dispatch_dtype_problem, known_dispatch_problem
from mythos_ds.config.divisors import divisors, nearest_divisors
from mythos_ds.config.layout import is_pipelined
from mythos_ds.config.rules import model as model_rules
from mythos_ds.config.rules import pipeline as pipeline_rules
from mythos_ds.config.schema import (
    PROCESSES,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    Section,
    TrainingConfig,
)
from mythos_ds.errors import Coded, Problem, coded

BUILTIN_VOCABULARY = 4096
MINIMUM_DEEP_SHARE = 0.01
MUON_MAX_PARAMETERS = 10e9
_MLA_NEEDED = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MLA_ONLY = (*_MLA_NEEDED, "q_lora_rank")
_GQA_ONLY = ("n_kv_heads", "head_dim", "attention_biases", "no_rope_layers")
_BUILT = (
    ("n_kv_heads", model_rules.kv_heads),
    ("head_dim", model_rules.head_dim),
    ("qk_rope_head_dim", model_rules.rope_dim),
    ("n_experts_per_tok", model_rules.top_k),
    ("n_expert_groups", model_rules.groups),
    ("n_limited_groups", model_rules.limited_groups),
    ("dim", model_rules.size),
)
_ADAM_ONLY = ("beta1", "beta2", "eps")


@dataclass(frozen=True)
class Rule:
    """`broken(config)` is a message about `key` with the rule's code, or None."""

    key: str
    broken: Callable[[RunConfig], Coded | None]


def given(section: Section, field: str) -> bool:
    """Whether `field` is set to something else than its default: a file may spell defaults out."""
    default = type(section).model_fields[field].default
    return field in section.model_fields_set and getattr(section, field) != default


def check(config: RunConfig) -> list[Problem]:
    """(key path, message) of every broken rule that does not depend on the number of processes."""
    problems = [(rule.key, message) for rule in RULES if (message := rule.broken(config)) is not None]
    problems += pipeline_rules.gathering_keys(config)
    own = deepspeed_section.check(config.deepspeed) + deepspeed_values.check(config.deepspeed)
    return _first_of_each_key(problems + own + deepspeed_values.check_together(config))


def check_partial(config: RunConfig) -> list[Problem]:
    """`check` where wrong values were left out: a rule about an absent value says nothing."""
    problems: list[Problem] = []
    for rule in RULES:
        with contextlib.suppress(AttributeError):
            message = rule.broken(config)
            problems += [(rule.key, message)] if message is not None else []
    with contextlib.suppress(AttributeError):
        problems += pipeline_rules.gathering_keys(config)
        problems += deepspeed_values.check_together(config)
    own = deepspeed_section.check(config.deepspeed) + deepspeed_values.check(config.deepspeed)
    return _first_of_each_key(problems + own)


def check_model(model: ModelConfig) -> list[Problem]:
    """(key, message) of every rule without which a model cannot be built, also one that is not to be trained."""
    needed = [name for name in _MLA_NEEDED if model.attn_type == "mla" and getattr(model, name) is None]
    problems = [(name, Coded("MDS207", 'missing; required with attn_type "mla"')) for name in needed]
    found = ((key, rule(model)) for key, rule in _BUILT)
    return problems + [(key, message) for key, message in found if message is not None]


def _first_of_each_key(problems: list[Problem]) -> list[Problem]:
    """One message per key: RULES has the stricter rule of a key first."""
    first: dict[str, Coded] = {}
    for key, message in problems:
        first.setdefault(key, message)
    return list(first.items())


def check_world(config: RunConfig, world_size: int) -> list[Problem]:
    """(key path, message) of every setting that does not fit `world_size` processes, or the length of the run.

    The length is looked at here and not in `check`, because a proxy shortens it and its warm-up together.
    """
    if world_size > PROCESSES:
        return [("cluster.nodes", Coded("MDS260", f"{world_size:,} processes in all; allowed: at most {PROCESSES:,}"))]
    problems: list[Problem] = []
    if (message := _warmup(config.training)) is not None:
        problems.append(("training.warmup_steps", message))
    if (message := _curriculum(config.training)) is not None:
        problems.append(("training.depth_curriculum_steps", message))
    if is_pipelined(config.parallel):
        return problems + pipeline_rules.world_problems(config, world_size)
    if (message := _batch_problem(config.training, world_size)) is not None:
        problems.append(("training.global_batch_size", message))
    elif (message := _ramp_unit(config.training, config.training.micro_batch_size * world_size)) is not None:
        problems.append(("training.global_batch_ramp", message))
    if (message := _ep_world_problem(config, world_size)) is not None:
        problems.append(("parallel.ep_size", message))
    return problems


@coded("MDS263")
def _batch_problem(training: TrainingConfig, world_size: int) -> str | None:
    unit = training.micro_batch_size * world_size
    batch = training.global_batch_size
    if batch % unit == 0:
        return None
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    nearest = f"{below} or {above}" if below else str(above)
    return (
        f"{batch} given; allowed: multiples of micro_batch_size x processes = {training.micro_batch_size} x "
        f"{world_size} = {unit}; nearest: {nearest}"
    )


@coded("MDS265")
def _ep_world_problem(config: RunConfig, world_size: int) -> str | None:
    ep_size = config.parallel.ep_size
    if ep_size == "auto" or ep_size < 1 or world_size % ep_size == 0:
        return None
    nearest = nearest_divisors(ep_size, config.model.n_experts, world_size)
    return (
        f"{ep_size} given; allowed: divisors of the {world_size} processes and of the "
        f'{config.model.n_experts} experts; nearest: {nearest}, or "auto"'
    )


@coded("MDS280")
def _grad_dtype(config: RunConfig) -> str | None:
    if config.training.grad_dtype == "float32":
        return None
    if config.training.dtype == "float32":
        return '"bfloat16" given with dtype "float32", where it has no effect; nearest: "float32"'
    if is_pipelined(config.parallel):
        pp_size = config.parallel.pp_size
        return f'"bfloat16" given with pp_size {pp_size}, which adds micro-batches up too; nearest: "float32"'
    return None


@coded("MDS243")
def _ep_divides_experts(config: RunConfig) -> str | None:
    ep_size, n_experts = config.parallel.ep_size, config.model.n_experts
    if ep_size == "auto" or (ep_size >= 1 and n_experts % ep_size == 0):
        return None
    nearest = nearest_divisors(ep_size, n_experts)
    return f'{ep_size} given; allowed: "auto" or a divisor of n_experts = {n_experts}; nearest: {nearest}'


@coded("MDS244")
def _ep_fits_nodes(config: RunConfig) -> str | None:
    """Expert groups are consecutive ranks: a group inside a node, or of whole nodes, shares no node's network card."""
    ep_size, cluster, n_experts = config.parallel.ep_size, config.cluster, config.model.n_experts
    if cluster is None or ep_size == "auto" or ep_size < 1:
        return None
    gpus = cluster.gpus_per_node
    if gpus % ep_size == 0 or ep_size % gpus == 0:
        return None
    fitting = [n for n in divisors(n_experts) if gpus % n == 0 or n % gpus == 0]
    nearest = min(fitting, key=lambda n: abs(n - ep_size))
    return (
        f"{ep_size} given with cluster.gpus_per_node = {gpus}: some groups would hold parts of nodes; allowed: "
        f"divisors and multiples of {gpus}; nearest: {nearest}"
    )


def _no_effect(
    code: str, fields: tuple[str, ...], section: str, why: str, when: Callable[[RunConfig], bool]
) -> list[Rule]:
    """Rules that refuse a setting that would do nothing."""

    def rule(field: str) -> Rule:
        @coded(code)
        def broken(config: RunConfig) -> str | None:
            is_set = given(getattr(config, section), field)
            return f"has no effect {why}; remove it" if is_set and when(config) else None

        return Rule(f"{section}.{field}", broken)

    return [rule(field) for field in fields]


def _needed(
    code: str, fields: tuple[str, ...], section: str, why: str, when: Callable[[RunConfig], bool]
) -> list[Rule]:
    """Rules that ask for a setting."""

    def rule(field: str) -> Rule:
        @coded(code)
        def broken(config: RunConfig) -> str | None:
            is_null = getattr(getattr(config, section), field) is None
            return f"missing; required {why}" if is_null and when(config) else None

        return Rule(f"{section}.{field}", broken)

    return [rule(field) for field in fields]


def _model(key: str, broken: Callable[[ModelConfig], Coded | None]) -> Rule:
    return Rule(f"model.{key}", lambda config: broken(config.model))


def _training(key: str, broken: Callable[[TrainingConfig], Coded | None]) -> Rule:
    return Rule(f"training.{key}", lambda config: broken(config.training))


def _parallel(key: str, broken: Callable[[ParallelConfig], Coded | None]) -> Rule:
    return Rule(f"parallel.{key}", lambda config: broken(config.parallel))


def _data(key: str, broken: Callable[[DataConfig], Coded | None]) -> Rule:
    return Rule(f"data.{key}", lambda config: broken(config.data))


@coded("MDS242")
def _backprop_depth(config: RunConfig) -> str | None:
    depth, max_loops = config.training.mean_backprop_depth, config.model.max_loops
    if depth is None or depth <= max_loops:
        return None
    return f"{depth} given; allowed: 1 to max_loops = {max_loops}; nearest: {max_loops}"


@coded("MDS222")
def _deep_loops_are_trained(config: RunConfig) -> str | None:
    """Loops beyond max_loops / 2 must be drawn often enough, or max_loops promises a depth never trained."""
    model, training = config.model, config.training
    if training.depth_distribution == "fixed" or model.mean_recurrence > model.max_loops:
        return None
    shares = deep_shares(
        depth_pmf(training.depth_distribution, model.mean_recurrence, training.depth_sigma, model.max_loops)
    )
    if shares[-1] >= MINIMUM_DEEP_SHARE:
        return None
    nearest = next(
        loops
        for loops in range(model.max_loops - 1, 0, -1)
        if shares[loops - 1] >= MINIMUM_DEEP_SHARE or loops == model.mean_recurrence
    )
    return (
        f"{model.max_loops} given, but with mean_recurrence = {model.mean_recurrence} only "
        f"{shares[-1]:.2%} of the steps go beyond max_loops / 2; allowed: at least "
        f"{MINIMUM_DEEP_SHARE:.0%}; nearest: {nearest}"
    )


@coded("MDS228")
def _length(training: TrainingConfig) -> str | None:
    if (training.max_steps is None) == (training.max_tokens is None):
        which = "neither is" if training.max_steps is None else "both are"
        return f"{which} given; allowed: exactly one of max_steps and max_tokens"
    return None


def steps_of(training: TrainingConfig) -> int:
    """Optimizer steps of the run; 0 where the length is not given."""
    if training.max_steps is not None:
        return training.max_steps
    return BatchSchedule.of(training).steps(-(-(training.max_tokens or 0) // training.seq_len))


@coded("MDS261")
def _warmup(training: TrainingConfig) -> str | None:
    steps = steps_of(training)
    if steps == 0 or training.warmup_steps < steps:
        return None
    return f"{training.warmup_steps} given; allowed: less than the run's {steps} steps; nearest: {steps - 1}"


@coded("MDS262")
def _curriculum(training: TrainingConfig) -> str | None:
    steps = steps_of(training)
    if steps == 0 or training.depth_curriculum_steps <= steps:
        return None
    return f"{training.depth_curriculum_steps} given; allowed: at most the run's {steps} steps; nearest: {steps}"


@coded("MDS230")
def _ramp(training: TrainingConfig) -> str | None:
    ramp, size = training.global_batch_ramp, training.global_batch_size
    if ramp is None:
        return None
    if ramp.start >= size:
        return f"start {ramp.start} given; allowed: less than global_batch_size = {size}"
    if (size - ramp.start) % ramp.increment:
        return (
            f"increment {ramp.increment} given; allowed: divisors of global_batch_size - start = {size - ramp.start}; "
            f"nearest: {nearest_divisors(ramp.increment, size - ramp.start)}"
        )
    sizes = (size - ramp.start) // ramp.increment
    return None if sizes <= MAX_SIZES else f"{sizes:,} increments; allowed: at most {MAX_SIZES:,}"


@coded("MDS264")
def _ramp_unit(training: TrainingConfig, unit: int) -> str | None:
    """Every size must give each process whole micro-batches."""
    ramp, size = training.global_batch_ramp, training.global_batch_size
    if ramp is None:
        return None
    what = f"allowed: multiples of micro_batch_size x processes = {unit}"
    if ramp.start % unit:
        below = ramp.start // unit * unit
        nearest = [str(start) for start in (below, below + unit) if 0 < start < size]
        return f"start {ramp.start} given; {what}" + (f"; nearest: {' or '.join(nearest)}" if nearest else "")
    if ramp.increment % unit:
        fitting = [number * unit for number in divisors((size - ramp.start) // unit)]
        smaller = [number for number in fitting if number < ramp.increment][-1:]
        nearest = [str(number) for number in (*smaller, *[each for each in fitting if each > ramp.increment][:1])]
        return f"increment {ramp.increment} given; {what}; nearest: {' or '.join(nearest)}"
    return None


@coded("MDS239")
def _depth_per(config: RunConfig) -> str | None:
    if config.training.depth_per == "step":
        return None
    if is_pipelined(config.parallel):
        why = f"pp_size {config.parallel.pp_size}, whose stages visit whole micro-batches"
    elif config.model.halting in ("act", "act_openmythos"):
        why = f'halting "{config.model.halting}", which gives each position a depth'
    elif config.training.depth_distribution == "fixed":
        why = 'depth_distribution "fixed", where it has no effect'
    else:
        return None
    return f'"sequence" given with {why}; nearest: "step"'


@coded("MDS229")
def _micro_batch(training: TrainingConfig) -> str | None:
    if training.global_batch_size % training.micro_batch_size == 0:
        return None
    nearest = nearest_divisors(training.micro_batch_size, training.global_batch_size)
    return (
        f"{training.micro_batch_size} given; allowed: divisors of global_batch_size = "
        f"{training.global_batch_size}; nearest: {nearest}"
    )


@coded("MDS248")
def _corpus(data: DataConfig) -> str | None:
    if (data.corpus is None) == (data.datasets is None):
        which = "neither is" if data.corpus is None else "both are"
        return f'{which} given; allowed: exactly one of corpus ("builtin") and datasets'
    return None


@coded("MDS249")
def _datasets(data: DataConfig) -> str | None:
    if data.datasets is None:
        return None
    if not data.datasets:
        return "an empty list given; allowed: at least one {prefix, weight}"
    prefixes = [dataset.prefix for dataset in data.datasets]
    twice = sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1})
    return f"{twice[0]} is listed twice; give it once, with the sum of the weights" if twice else None


@coded("MDS250")
def _split(data: DataConfig) -> str | None:
    if min(data.split) < 0 or sum(data.split) <= 0:
        return f"{list(data.split)} given; allowed: three shares >= 0 with a positive sum"
    return f"{list(data.split)} given; the share of training must be > 0" if data.split[0] == 0 else None


@coded("MDS251")
def _validation(data: DataConfig) -> str | None:
    if data.validation in ("", []):
        return f'{data.validation!r} given; allowed: a prefix, at least one {{prefix, weight}}, or "none"'
    prefixes = [dataset.prefix for dataset in data.own_validation]
    twice = sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1})
    if twice:
        return f"{twice[0]} is listed twice; give it once, with the sum of the weights"
    trained = sorted(set(prefixes) & {dataset.prefix for dataset in data.datasets or ()})
    return f"{trained[0]} is also in data.datasets, which is trained on; give other text, or none" if trained else None


@coded("MDS255")
def _vocabulary(config: RunConfig) -> str | None:
    size = config.model.vocab_size
    if config.data.corpus != "builtin" or size >= BUILTIN_VOCABULARY:
        return None
    least = BUILTIN_VOCABULARY
    return f"{size} given; allowed: >= {least} with the built-in corpus; nearest: {least}"


@coded("MDS245")
def _zero_stage(config: RunConfig) -> str | None:
    if config.parallel.zero_stage == 0 and config.parallel.ep_size not in (0, 1, "auto"):
        return (
            f"0 given with ep_size = {config.parallel.ep_size}; DeepSpeed clips by a wrong norm there; "
            "allowed: 1, 2 or 3; nearest: 1"
        )
    return None


@coded("MDS246")
def _offload_params(parallel: ParallelConfig) -> str | None:
    if parallel.offload_params != "cpu" or parallel.zero_stage == 3:
        return None
    return f'"cpu" given with zero_stage {parallel.zero_stage}; allowed: zero_stage 3'


@coded("MDS247")
def _offload_optimizer(parallel: ParallelConfig) -> str | None:
    if parallel.offload_optimizer != "cpu" or parallel.zero_stage != 0:
        return None
    return '"cpu" given with zero_stage 0; allowed: zero_stage 1, 2 or 3'


def _is_mla(config: RunConfig) -> bool:
    return config.model.attn_type == "mla"


def _is_gqa(config: RunConfig) -> bool:
    return config.model.attn_type == "gqa"


@coded("MDS236")
def _muon_clip(config: RunConfig) -> str | None:
    clip = config.training.grad_clip
    if not _is_muon(config) or clip == 0:
        return None
    return f"{clip} given; DeepSpeed would clip Muon's update, not the gradient; allowed with muon: 0; nearest: 0"


@coded("MDS237")
def _muon_layout(config: RunConfig) -> str | None:
    parallel = config.parallel
    if not _is_muon(config):
        return None
    if parallel.zero_stage == 0:
        return '"muon" given with zero_stage 0; allowed: zero_stage 1, 2 or 3'
    if "cpu" in (parallel.offload_optimizer, parallel.offload_params):
        return '"muon" given with offloading; allowed: offload_optimizer and offload_params "none"'
    routed = model_rules.routed_parameters(config.model)
    if routed > MUON_MAX_PARAMETERS:
        return (
            f'"muon" given for {routed / 1e9:.1f}G routed parameters: every step gathers all gradients; '
            f'allowed up to {MUON_MAX_PARAMETERS / 1e9:.0f}G; nearest: "adamw"'
        )
    return None


def _is_muon(config: RunConfig) -> bool:
    return config.training.optimizer == "muon"


RULES: tuple[Rule, ...] = (
    Rule("parallel.pp_size", pipeline_rules.form),
    _model("halting", model_rules.halting),
    Rule("model.halting", pipeline_rules.halting),
    Rule("parallel.zero_stage", pipeline_rules.zero_stage),
    Rule("training.optimizer", pipeline_rules.optimizer),
    Rule("parallel.offload_params", pipeline_rules.offload_params),
    *_needed("MDS207", _MLA_NEEDED, "model", 'with attn_type "mla"', _is_mla),
    *_no_effect("MDS208", _GQA_ONLY, "model", 'with attn_type "mla"', _is_mla),
    *_no_effect("MDS209", _MLA_ONLY, "model", 'with attn_type "gqa"', _is_gqa),
    _model("qk_norm", model_rules.qk_norm),
    *_no_effect("MDS211", ("qk_norm_span",), "model", "unless qk_norm is true", lambda c: not c.model.qk_norm),
    _model("rope_scaling", model_rules.rope_scaling),
    _model("no_rope_layers", model_rules.no_rope_layers),
    _model("n_kv_heads", model_rules.kv_heads),
    _model("head_dim", model_rules.head_dim),
    _model("qk_rope_head_dim", model_rules.rope_dim),
    _model("n_experts_per_tok", model_rules.top_k),
    _model("n_expert_groups", model_rules.groups),
    _model("n_limited_groups", model_rules.limited_groups),
    *_no_effect(
        "MDS220", ("shared_expert_dim",), "model", "with n_shared_experts 0", lambda c: c.model.n_shared_experts == 0
    ),
    _model("mean_recurrence", model_rules.mean_recurrence),
    Rule("model.max_loops", _deep_loops_are_trained),
    _model("discretisation", model_rules.discretisation),
    _model("dim", model_rules.loop_embedding_width),
    _model("dim", model_rules.size),
    *_no_effect("MDS226", ("lora_target",), "model", "with lora_rank 0", lambda c: c.model.lora_rank == 0),
    *_no_effect("MDS227", ("act_threshold",), "model", 'with halting "none"', lambda c: c.model.halting == "none"),
    _training("max_steps", _length),
    _training("micro_batch_size", _micro_batch),
    _training("global_batch_ramp", _ramp),
    *_no_effect(
        "MDS231", ("decay_fraction",), "training", 'unless schedule is "wsd"', lambda c: c.training.schedule != "wsd"
    ),
    *_no_effect(
        "MDS232", ("min_lr_ratio",), "training", 'with schedule "constant"', lambda c: c.training.schedule == "constant"
    ),
    *_no_effect("MDS233", _ADAM_ONLY, "training", 'with optimizer "sgd"', lambda c: c.training.optimizer == "sgd"),
    *_no_effect(
        "MDS234", ("muon_lr", "muon_momentum"), "training", 'unless optimizer is "muon"', lambda c: not _is_muon(c)
    ),
    *_needed("MDS235", ("muon_lr",), "training", 'with optimizer "muon"', _is_muon),
    Rule("training.grad_clip", _muon_clip),
    Rule("training.optimizer", _muon_layout),
    *_no_effect(
        "MDS238",
        ("depth_sigma",),
        "training",
        'unless depth_distribution is "lognormal_poisson"',
        lambda c: c.training.depth_distribution != "lognormal_poisson",
    ),
    Rule("training.depth_per", _depth_per),
    *_no_effect(
        "MDS240",
        ("depth_curriculum_steps",),
        "training",
        "with mean_recurrence 1",
        lambda c: c.model.mean_recurrence == 1,
    ),
    *_no_effect("MDS241", ("ponder_cost",), "training", 'unless halting is "act"', lambda c: c.model.halting != "act"),
    *_no_effect(
        "MDS770", ("eval_deep_every",), "training", "with eval_interval 0", lambda c: c.training.eval_interval == 0
    ),
    Rule("training.mean_backprop_depth", _backprop_depth),
    Rule("training.grad_dtype", _grad_dtype),
    Rule("parallel.ep_size", _ep_divides_experts),
    Rule("parallel.ep_size", _ep_fits_nodes),
    Rule("parallel.dispatch", known_dispatch_problem),
    Rule("parallel.dispatch_dtype", known_dispatch_dtype_problem),
    Rule("parallel.zero_stage", _zero_stage),
    _parallel("offload_params", _offload_params),
    _parallel("offload_optimizer", _offload_optimizer),
    _data("corpus", _corpus),
    _data("datasets", _datasets),
    _data("split", _split),
    _data("validation", _validation),
    *_needed("MDS252", ("tokenizer",), "data", "with datasets", lambda c: c.data.datasets is not None),
    *_no_effect(
        "MDS253",
        ("tokenizer",),
        "data",
        "with the built-in corpus, which makes its own",
        lambda c: c.data.corpus is not None and c.data.datasets is None,
    ),
    *_no_effect(
        "MDS254", ("loss_mask",), "data", "with the built-in corpus, which is text", lambda c: c.data.corpus is not None
    ),
    Rule("model.vocab_size", _vocabulary),
)
