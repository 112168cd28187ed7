"""The proxy of a file with training stages: all of them, short, in the proportions of the file."""

import json

import pytest

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.loader import LoadedConfig, check_raw, load_config
from mythos_ds.config.proxy import MAX_SEQ_LEN, SEQ_LEN, STEPS, make_proxies, make_proxy
from mythos_ds.config.resolve import resolve_stages
from tests.helpers.paths import ROOT


def staged(folder, **more) -> LoadedConfig:
    """tiny in three stages, the second with YaRN and a ramp, the third longer than a proxy may be."""
    content = json.loads((ROOT / "ds_configs" / "tiny.json").read_text())
    del content["deepspeed"]  # not all of which has an effect with a pipeline
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    ramp = {"start": 4, "increment": 4, "samples": 100}
    content["stages"] = [
        {"name": "pretrain"},
        {
            "name": "long",
            "model": {"rope_scaling": scaling},
            "training": {"seq_len": 1024, "max_steps": 50, "global_batch_ramp": ramp, "warmup_steps": 0},
        },
        {"name": "longest", "training": {"seq_len": 65536, "max_steps": 5}},
    ]
    path = folder / "staged.json"
    path.write_text(json.dumps(content | more))
    return load_config(str(path))


@pytest.mark.parametrize("world_size", [1, 2])
def test_lengths_keep_their_ratio_and_ramps_grow(tmp_path, world_size):
    loaded = staged(tmp_path)
    proxies, lines = make_proxies(loaded.stages, world_size, loaded.stages)
    assert [stage.name for stage in proxies] == ["pretrain", "long", "longest"]
    lengths = [stage.config.training.seq_len for stage in proxies]
    assert lengths == [SEQ_LEN, 4 * SEQ_LEN, MAX_SEQ_LEN]
    scaling = [stage.config.model.rope_scaling for stage in proxies]
    assert scaling[0] is None
    assert {one.original_max_position_embeddings for one in scaling[1:] if one is not None} == {SEQ_LEN}
    runs = [stage.run for stage in resolve_stages(proxies, world_size)]
    assert sum(run.max_steps for run in runs) <= STEPS
    ramped = BatchSchedule.of(proxies[1].config.training)
    assert ramped.at(0) == ramped.size // 2 < ramped.at(runs[1].max_steps - 1) == ramped.size
    assert [stage.config.training.global_batch_ramp for stage in (proxies[0], proxies[2])] == [None, None]
    assert "proxy: stages.long.training.seq_len: 1024 -> 256" in lines
    assert "proxy: training.seq_len: 256 -> 64" in lines
    assert len(set(lines)) == len(lines)


def test_a_stage_alone_is_the_one_of_the_whole_run(tmp_path):
    loaded = staged(tmp_path)
    whole, _ = make_proxies(loaded.stages, 2, loaded.stages)
    rest, _ = make_proxies(loaded.stages[1:], 2, loaded.stages)
    assert rest == whole[1:]


@pytest.mark.parametrize("pp_size", [2, [1, 2, 1]])
def test_a_ramp_fits_a_pipeline(tmp_path, pp_size):
    loaded = staged(tmp_path)
    changed = [stage.config.model_copy(update={"parallel": stage.config.parallel.model_copy(update={
        "pp_size": pp_size})}) for stage in loaded.stages]  # fmt: skip
    model = changed[1].model.model_copy(update={"recurrent_layers": 2})
    proxy, _ = make_proxy(changed[1].model_copy(update={"model": model}), 4, 256, 6)
    assert proxy.parallel.pp_size == pp_size
    assert proxy.training.global_batch_ramp is not None
    run = check_raw(proxy.model_dump(mode="json", exclude_unset=True), [], tmp_path / "x.json")
    assert resolve_stages(run.stages, 4)[0].run.max_steps == 6


@pytest.mark.parametrize(("name", "names"), [("100b", ["pretrain", "long", "anneal"]), ("1t", ["pretrain", "anneal"])])
def test_presets_have_stages_and_proxies_of_them(name, names):
    loaded = load_config(name)
    assert [stage.name for stage in loaded.stages] == names
    proxies, _ = make_proxies(loaded.stages, 2, loaded.stages)
    assert proxies[0].config == make_proxy(loaded.config, 2, steps=STEPS // len(names))[0]
    runs = [stage.run for stage in resolve_stages(proxies, 2)]
    assert all(run.max_steps == STEPS // len(names) for run in runs)
    decays = [stage.config.training.decay_fraction for stage in loaded.stages]
    assert decays == [0.0] * (len(names) - 1) + [1.0]
    assert loaded.stages[-1].config.training.min_lr_ratio == 0
    cluster = loaded.config.cluster
    assert cluster is not None
    whole = resolve_stages(loaded.stages, cluster.nodes * cluster.gpus_per_node)
    assert sum(run.run.total_tokens for run in whole) == pytest.approx({"100b": 2e12, "1t": 15e12}[name], rel=1e-5)
    assert len({stage.run.tokens_per_step for stage in whole}) == 1
