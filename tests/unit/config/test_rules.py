"""Rules between settings, what is derived from them, and the proxy."""

import contextlib
import json
import random

import pytest

from mythos_ds.config import deepspeed_section
from mythos_ds.config.depth_distribution import depth_pmf, mean_depth
from mythos_ds.config.loader import load_config
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.costs.dry_run import dry_run_report
from mythos_ds.errors import ConfigError

PRESETS = ["tiny", "1b", "3b", "10b", "50b", "100b", "500b", "1t"]
MLA = ["model.attn_type=mla", "model.n_kv_heads=null", "model.qk_norm=false", "model.kv_lora_rank=32",
       "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8", "model.v_head_dim=16"]  # fmt: skip
KEPT = ("recurrent_layers", "max_loops", "mean_recurrence", "attn_type", "n_shared_experts", "injection",
        "n_experts_per_tok")  # fmt: skip
LINEAR = ["model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=8"]
YARN = ["model.rope_scaling.rope_type=yarn", "model.rope_scaling.factor=8",
        "model.rope_scaling.original_max_position_embeddings=64"]  # fmt: skip
POISSON = ["training.depth_distribution=poisson"]
SGD = ["training.optimizer=sgd"]
PER_SEQUENCE = ["training.depth_per=sequence"]


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["parallel.ep_size=3"], "parallel.ep_size", "nearest: 2 or 4"),
        (["parallel.ep_size=0"], "parallel.ep_size", "nearest: 1"),
        (["parallel.zero_stage=0", "parallel.ep_size=2"], "parallel.zero_stage", "nearest: 1"),
        (["training.max_tokens=9000", "training.max_steps=9"], "training.max_steps", "exactly one of"),
        (["training.max_steps=null"], "training.max_steps", "exactly one of"),
        (["training.micro_batch_size=3"], "training.micro_batch_size", "nearest: 2 or 4"),
        (["training.mean_backprop_depth=17"], "training.mean_backprop_depth", "nearest: 16"),
        (["training.decay_fraction=0.1"], "training.decay_fraction", "no effect"),
        (["training.schedule=constant", "training.min_lr_ratio=0.1"], "training.min_lr_ratio", "no effect"),
        ([*SGD, "training.beta1=0.8"], "training.beta1", "no effect"),
        ([*SGD, "training.eps=1"], "training.eps", "no effect"),
        ([*POISSON, "training.depth_sigma=0.3"], "training.depth_sigma", "no effect"),
        (["training.ponder_cost=0.1"], "training.ponder_cost", "no effect"),
        (["training.grad_dtype=bfloat16"], "training.grad_dtype", "no effect"),
        (["parallel.ep_size=1", "parallel.dispatch=per_rank"], "parallel.dispatch", 'nearest: "auto"'),
        (["training.dtype=bfloat16", "training.grad_dtype=bfloat16", "model.recurrent_layers=2", "parallel.pp_size=2"],
         "training.grad_dtype", 'nearest: "float32"'),
        ([*PER_SEQUENCE, "model.recurrent_layers=2", "parallel.pp_size=2"], "training.depth_per", 'nearest: "step"'),
        ([*PER_SEQUENCE, "model.halting=act"], "training.depth_per", 'nearest: "step"'),
        ([*PER_SEQUENCE, "training.depth_distribution=fixed"], "training.depth_per", "no effect"),
        (["model.mean_recurrence=1", "model.max_loops=2", "training.depth_curriculum_steps=9"],
         "training.depth_curriculum_steps", "no effect"),
        (["model.act_threshold=0.9"], "model.act_threshold", "no effect"),
        (["model.lora_rank=0", "model.lora_target=output"], "model.lora_target", "no effect"),
        (["model.kv_lora_rank=64"], "model.kv_lora_rank", 'no effect with attn_type "gqa"'),
        (["model.attn_type=mla"], "model.kv_lora_rank", "missing; required"),
        (["model.attn_type=mla"], "model.n_kv_heads", "no effect"),
        ([*MLA, "model.qk_norm=true"], "model.qk_norm", "allowed: false"),
        ([*MLA, "model.qk_rope_head_dim=7"], "model.qk_rope_head_dim", "nearest: 6 or 8"),
        (["model.n_kv_heads=3"], "model.n_kv_heads", "nearest: 2 or 4"),
        (["model.head_dim=33"], "model.head_dim", "even"),
        (["model.n_heads=6", "model.n_kv_heads=2"], "model.head_dim", "missing; required where"),
        (["model.n_experts_per_tok=17"], "model.n_experts_per_tok", "nearest: 16"),
        (["model.n_expert_groups=4"], "model.n_limited_groups", "missing"),
        (["model.n_limited_groups=2"], "model.n_expert_groups", "missing"),
        (["model.n_expert_groups=3", "model.n_limited_groups=1"], "model.n_expert_groups", "nearest: 2 or 4"),
        (["model.n_expert_groups=4", "model.n_limited_groups=5"], "model.n_limited_groups", "1 to"),
        (["model.n_expert_groups=16", "model.n_limited_groups=1"], "model.n_experts_per_tok", "at most"),
        (["model.mean_recurrence=17"], "model.mean_recurrence", "nearest: 16"),
        (["model.max_loops=64"], "model.max_loops", "go beyond max_loops / 2"),
        (["model.discretisation=direct"], "model.discretisation", '"euler" or "zoh"'),
        (["model.dim=129", "model.head_dim=32"], "model.dim", "multiples of 2"),
        ([*MLA, "model.no_rope_layers=[0]"], "model.no_rope_layers", "no effect"),
        (["model.no_rope_layers=[2,0,3]"], "model.no_rope_layers", "from 0 to 2; nearest: [0, 2]"),
        ([*MLA, "model.attention_biases=qkv"], "model.attention_biases", "no effect"),
        (["model.qk_norm=false", "model.qk_norm_span=all"], "model.qk_norm_span", "no effect unless qk_norm"),
        ([*MLA, *LINEAR], "model.rope_scaling", 'attn_type "mla": null'),
        ([*LINEAR, "model.rope_scaling.beta_fast=32"], "model.rope_scaling", 'beta_fast has no effect with rope_type'),
        (["model.rope_scaling.rope_type=llama3", "model.rope_scaling.factor=8"], "model.rope_scaling",
         "original_max_position_embeddings is missing"),
        ([*YARN, "model.rope_scaling.mscale=1"], "model.rope_scaling", "mscale has no effect alone"),
        ([*YARN, "model.rope_scaling.attention_factor=1", "model.rope_scaling.mscale=1",
          "model.rope_scaling.mscale_all_dim=1"], "model.rope_scaling", "beside attention_factor"),
        (["model.rope_scaling.rope_type=dynamic", "model.rope_scaling.factor=8"], "model.rope_scaling.rope_type",
         '"dynamic" given; allowed: "linear" or "llama3" or "yarn"'),
        ([*LINEAR, "model.rope_scaling.facter=8"], "model.rope_scaling.facter", "did you mean 'factor'"),
        (["model.shared_expert_dim=64", "model.n_shared_experts=0"], "model.shared_expert_dim", "no effect"),
        (["model.vocab_size=4000"], "model.vocab_size", "nearest: 4096"),
        (["data.tokenizer=a.model"], "data.tokenizer", "no effect"),
        (['data.datasets=[{"prefix":"a"}]'], "data.tokenizer", "missing; required with datasets"),
        (["data.datasets=[]", "data.tokenizer=a"], "data.datasets", "an empty list"),
        (["data.split=[0,1,0]"], "data.split", "must be > 0"),
        (["parallel.offload_params=cpu", "parallel.zero_stage=2"], "parallel.offload_params", "zero_stage 3"),
        (["parallel.offload_optimizer=cpu", "parallel.zero_stage=0"], "parallel.offload_optimizer", "1, 2"),
    ],
)  # fmt: skip
def test_rule(overrides, key, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    assert any(f" {key}: " in line and expected in line for line in caught.value.problems), caught.value.problems


def test_valid_variants_load():
    for overrides in (
        MLA,
        SGD,
        [*YARN, "model.attention_biases=all", "model.qk_norm_span=all", "model.norm_placement=after"],
        ["model.loop_embedding=raw", "model.dim=132", "model.head_dim=32"],
        [*PER_SEQUENCE, "training.depth_curriculum_steps=100"],
        ["model.halting=act", "training.ponder_cost=0.01", "model.act_threshold=0.9"],
    ):
        load_config("tiny", overrides)


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        (["parallel.ep_size=4"], 2, "nearest: 2, or"),
        (["training.global_batch_size=20"], 2, "nearest: 16 or 24"),
        ([], 4, "nearest: 16"),
        (["training.warmup_steps=900"], 2, r"training\.warmup_steps.*nearest: 899"),
        (["training.depth_curriculum_steps=901"], 2, r"training\.depth_curriculum_steps.*nearest: 900"),
    ],
)
def test_rules_that_depend_on_the_processes(overrides, world, expected):
    config = load_config("tiny", overrides).config
    with pytest.raises(ConfigError, match=expected):
        resolve(config, world)


def test_derived_values():
    config = load_config("tiny", ["training.micro_batch_size=2"]).config
    run = resolve(config, 2)
    assert (run.ep_size, run.gradient_accumulation_steps, run.max_steps) == (2, 2, 900)
    assert (run.tokens_per_step, run.mean_backprop_depth, run.router_bias_rate) == (2048, 2, 0.01)
    assert (
        resolve(load_config("tiny", ["training.max_tokens=4097", "training.warmup_steps=0"]).config, 1).max_steps == 3
    )
    assert resolve(load_config("1b").config, 8).router_bias_rate == 1e-3 / 8
    assert resolve(load_config("tiny", ["parallel.zero_stage=0"]).config, 2).ep_size == 1


def test_deepspeed_section_is_merged_with_derived_keys():
    user = ["deepspeed.wall_clock_breakdown=true", "deepspeed.zero_optimization.overlap_comm=false"]
    config = load_config("tiny", [*user, "parallel.offload_optimizer=cpu", "training.dtype=bfloat16"]).config
    built = resolve(config, 2).deepspeed
    assert built["wall_clock_breakdown"] is True
    assert built["bf16"] == {"enabled": True}
    assert built["gradient_clipping"] == 1.0
    assert built["train_micro_batch_size_per_gpu"] == 4
    assert built["zero_optimization"]["stage"] == 3
    assert built["zero_optimization"]["overlap_comm"] is False
    assert built["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "optimizer" not in built
    assert config.deepspeed["zero_optimization"]["overlap_comm"] is False
    assert "stage" not in config.deepspeed["zero_optimization"], "the user's section stays as written"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train_batch_sise", "did you mean"),
        ("zero_optimisation.stage", "did you mean 'zero_optimization'?"),
        ("zero_optimization.overlap_com", "did you mean 'overlap_comm'?"),
        ("gradient_clipping", "set training.grad_clip"),
        ("zero_optimization.stage", "set parallel.zero_stage"),
        ("zero_optimization.zero_hpz_partition_size", "is not supported"),
        ("elasticity", "was removed"),
    ],
)
def test_deepspeed_keys_are_checked(key, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config("tiny", [f"deepspeed.{key}=1"])


def test_key_lists_agree_with_the_installed_deepspeed(monkeypatch):
    """Every name is one that DeepSpeed reads; ZeRO's list is complete."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = {field.alias or name for name, field in zero.DeepSpeedZeroConfig.model_fields.items()}
    assert set(deepspeed_section.KNOWN_ZERO_KEYS) == fields
    runtime = pytest.importorskip("deepspeed.runtime.config")
    removed = {*runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}" for key in runtime._REMOVED_ZERO_CONFIG_KEYS}
    assert set(deepspeed_section.REMOVED_KEYS) == removed
    assert not removed & set(deepspeed_section.KNOWN_KEYS)


def test_depth_distribution_is_the_samplers():
    depth = pytest.importorskip("mythos_ds.train.depth_sampler")
    for name in ("lognormal_poisson", "poisson", "uniform", "fixed"):
        pmf = depth_pmf(name, 4, 0.5, 12)
        assert sum(pmf) == pytest.approx(1.0)
        sampler = depth.DepthSampler(name, 4, 0.5, 12, seed=3)
        drawn = [sampler.loops_at(step) for step in range(4000)]
        assert sum(drawn) / len(drawn) == pytest.approx(mean_depth(pmf), abs=0.2)
        for loops in (1, 4, 8):
            assert drawn.count(loops) / len(drawn) == pytest.approx(pmf[loops - 1], abs=0.02)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_proxy_keeps_structure_and_resolves(name, world):
    config = load_config(name).config
    proxy, lines = make_proxy(config, world)
    resolve(proxy, world)
    before, after = config.model, proxy.model
    for key in KEPT:
        assert getattr(before, key) == getattr(after, key)
    assert proxy.parallel.zero_stage == config.parallel.zero_stage
    assert (after.dim, after.n_experts, proxy.training.seq_len, proxy.data.corpus) == (64, 32, 64, "builtin")
    assert abs(after.expert_dim / after.dim - before.expert_dim / before.dim) < 0.07
    changed = {line.split(":")[1].strip() for line in lines}
    assert "model.dim" in changed
    assert all(" -> " in line or "removed" in line for line in lines)


def test_proxy_keeps_which_layers_have_no_rope():
    """A proxy has one layer before the loop and one after it."""
    sizes = ["model.prelude_layers=3", "model.recurrent_layers=2", "model.coda_layers=3"]
    for given, expected in (([0, 3, 6], (0, 1)), ([2, 4, 5], (2, 3))):
        config = load_config("tiny", [*sizes, f"model.no_rope_layers={given}"]).config
        assert make_proxy(config, 1)[0].model.no_rope_layers == expected


def test_proxy_freezes_what_it_has():
    config = load_config("tiny", ['training.frozen=["embed.*", "coda.3.*", "*.router.weight"]']).config
    assert make_proxy(config, 1)[0].training.frozen == ["embed.*", "*.router.weight"]


def test_proxy_of_group_limited_routing_and_overrides():
    groups = [
        "model.n_expert_groups=64",
        "model.n_limited_groups=4",
        "training.max_steps=3",
        "training.warmup_steps=0",
    ]
    proxy, _ = make_proxy(load_config("1t", groups).config, 2)
    assert (proxy.model.n_expert_groups, proxy.model.n_limited_groups) == (16, 4)
    assert proxy.training.max_steps == 3


def test_reports_for_every_preset():
    for name in PRESETS:
        config = load_config(name).config
        run = resolve(config, planned_world_size(config))
        text = dry_run_report(run)
        assert "DeepSpeed configuration:" in text
        assert "parameters" in text
        printed = json.loads(json.dumps(run.as_dict()))
        assert printed["_derived"]["ep_size"] == run.ep_size
        assert printed["model"]["dim"] == config.model.dim


def test_printed_config_loads_again(tmp_path):
    """`--print-config` writes every default; defaults without effect are no error."""
    config = load_config("tiny").config
    path = tmp_path / "again.json"
    path.write_text(json.dumps(resolve(config, 2).as_dict()))
    assert load_config(str(path)).config.model_dump() == config.model_dump()


def test_garbage_never_escapes_as_another_error(tmp_path):
    """Random edits of a preset load or raise ConfigError, nothing else."""
    generator = random.Random(0)
    raw = json.loads(load_config("1b").text)
    values = [None, -1, 0, 7, 1e9, 0.5, "x", True, [], {}, [1], {"a": 1}]
    keys = [(section, key) for section in ("model", "parallel", "training", "data", "cluster") for key in raw[section]]
    path = tmp_path / "run.json"
    for _ in range(120):
        edited = json.loads(json.dumps(raw))
        for section, key in generator.sample(keys, 2):
            edited[section][key] = generator.choice(values)
        path.write_text(json.dumps(edited))
        with contextlib.suppress(ConfigError):
            resolve(load_config(str(path)).config, 8)
