"""How a model is cut into pipeline stages, the rules of pipelined runs, and their proxies."""

import itertools
import json

import pytest

from mythos_ds.config.layout import stages_of, whole_model
from mythos_ds.config.loader import find_config, load_config
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.resolve import resolve
from mythos_ds.costs.dry_run import dry_run_report
from mythos_ds.errors import ConfigError

HOLDS = "deepspeed.zero_optimization.stage3_param_persistence_threshold=null"
SMALL = [HOLDS, "model.recurrent_layers=4", "training.global_batch_size=16", "training.micro_batch_size=2"]


def stages(world_size, *overrides):
    return resolve(load_config("tiny", [*SMALL, *overrides]).config, world_size).stages


@pytest.mark.parametrize("pp_size", ["1", "2", "4", "[1,2,1]", "[2,1,1]"])
@pytest.mark.parametrize(("prelude", "coda"), [(1, 0), (3, 2), (5, 7)])
def test_every_layer_has_one_place_in_order(pp_size, prelude, coda):
    layers = [f"model.prelude_layers={prelude}", f"model.coda_layers={coda}", f"parallel.pp_size={pp_size}"]
    found = stages(4, *layers)
    everything = whole_model(load_config("tiny", [*SMALL, *layers]).config.model)
    for name in ("prelude", "recurrent", "coda"):
        parts = [getattr(stage.part, name) for stage in found]
        assert tuple(itertools.chain(*parts)) == getattr(everything, name)
    for name in ("embeds", "loops", "predicts"):
        assert sum(getattr(stage.part, name) for stage in found) == 1
    assert [stage.first_rank for stage in found] == [0, *itertools.accumulate(s.size for s in found)][:-1]
    assert sum(stage.size for stage in found) == 4


def test_the_ring_shares_the_loop_evenly_and_counts_the_head():
    found = stages(4, "parallel.pp_size=2", "model.prelude_layers=6", "model.coda_layers=6")
    assert [len(stage.part.recurrent) for stage in found] == [2, 2]
    assert [(stage.part.embeds, stage.part.loops, stage.part.predicts) for stage in found] == [
        (True, True, False),
        (False, False, True),
    ]
    # The head of tiny, 4096 x 128, weighs 2.7 dense layers.
    assert [len(stage.part.prelude) + len(stage.part.coda) for stage in found] == [7, 5]


def test_literal_stages():
    prelude, recurrent, coda = (stage.part for stage in stages(4, "parallel.pp_size=[1,2,1]"))
    assert (prelude.embeds, prelude.loops, prelude.predicts) == (True, False, False)
    assert (recurrent.embeds, recurrent.loops, recurrent.predicts) == (False, True, False)
    assert (coda.embeds, coda.loops, coda.predicts) == (False, False, True)
    assert [stage.rows for stage in stages(4, "parallel.pp_size=[1,2,1]")] == [4, 2, 4]


@pytest.mark.parametrize(
    ("pp_size", "ep_size", "micro_batches"), [("1", 4, 2), ("2", 2, 4), ("4", 1, 8), ("[1,2,1]", 2, 4)]
)
def test_what_follows(pp_size, ep_size, micro_batches):
    run = resolve(load_config("tiny", [*SMALL, f"parallel.pp_size={pp_size}"]).config, 4)
    assert run.ep_size == ep_size
    assert run.gradient_accumulation_steps == micro_batches
    assert run.deepspeed["gradient_accumulation_steps"] == (micro_batches if pp_size == "1" else 1)
    total = run.config.training.global_batch_size
    assert {stage.rows * stage.size * micro_batches for stage in run.stages} == {total}


def test_one_stage_without_pipeline():
    config = load_config("tiny").config
    (stage,) = stages_of(config, 2)
    assert (stage.part, stage.first_rank, stage.size, stage.rows) == (whole_model(config.model), 0, 2, 4)


RULES = {
    "P does not divide the layers": (4, ["parallel.pp_size=3"], "parallel.pp_size", "nearest: 2 or 4"),
    "no stage": (4, ["parallel.pp_size=0"], "parallel.pp_size", "nearest: 1"),
    "two literal stages": (4, ["parallel.pp_size=[1,3]"], "parallel.pp_size", "nearest: [1, 1, 1]"),
    "an empty literal stage": (4, ["parallel.pp_size=[0,3,1]"], "parallel.pp_size", "nearest: [1, 1, 1]"),
    "P does not divide the processes": (6, ["parallel.pp_size=4"], "parallel.pp_size", "nearest: 2"),
    "literal stages of other processes": (4, ["parallel.pp_size=[1,4,1]"], "parallel.pp_size", "nearest: [1, 2, 1]"),
    "too few ranks for ep_size": (4, ["parallel.pp_size=2", "parallel.ep_size=4"], "parallel.ep_size", "nearest: 2"),
    "too few in the literal stage": (
        4, ["parallel.pp_size=[2,1,1]", "parallel.ep_size=2"], "parallel.ep_size", "nearest: 1"
    ),
    "fewer micro-batches than stages": (
        4, ["parallel.pp_size=4", "training.global_batch_size=6"], "training.global_batch_size", "nearest: 8"
    ),
    "rounds of unequal size": (
        4, ["parallel.pp_size=4", "training.global_batch_size=18"], "training.global_batch_size", "nearest: 16 or 20"
    ),
    "part of a micro-batch": (
        4, ["parallel.pp_size=2", "training.global_batch_size=18"], "training.global_batch_size", "nearest: 16 or 24"
    ),
    "fewer than three micro-batches": (
        4, ["parallel.pp_size=[1,2,1]", "training.global_batch_size=8"], "training.global_batch_size", "nearest: 12"
    ),
    "literal stages that leave none for the loop": (
        4, ["parallel.pp_size=[3,1,3]"], "parallel.pp_size", "nearest: [1, 1, 2]"
    ),
    "fewer processes than literal stages": (2, ["parallel.pp_size=[1,1,1]"], "parallel.pp_size", "nearest: 1"),
    "an element that is no number": (4, ['parallel.pp_size=[1,"a",2]'], "parallel.pp_size[1]", "an integer"),
    "rows that cannot be shared": (
        7, ["parallel.pp_size=[4,2,1]", "training.micro_batch_size=1"], "training.micro_batch_size", "nearest: 2"
    ),
    "halting": (4, ["parallel.pp_size=2", "model.halting=act"], "model.halting", 'allowed: "none"'),
    "ZeRO 2": (4, ["parallel.pp_size=2", "parallel.zero_stage=2"], "parallel.zero_stage", "nearest: 3"),
    "ZeRO 0, which ep_size excludes too": (
        4, ["parallel.pp_size=2", "parallel.zero_stage=0", "parallel.ep_size=2"], "parallel.zero_stage", "nearest: 3"
    ),
    "parameter offload": (
        4, ["parallel.pp_size=2", "parallel.offload_params=cpu"], "parallel.offload_params", 'allowed: "none"'
    ),
    "muon": (
        4,
        ["parallel.pp_size=2", "training.optimizer=muon", "training.muon_lr=0.1", "training.grad_clip=0"],
        "training.optimizer",
        '"adamw" or "sgd"',
    ),
    "a key that does nothing": (
        4,
        ["parallel.pp_size=2", "deepspeed.zero_optimization.stage3_max_live_parameters=100"],
        "deepspeed.zero_optimization.stage3_max_live_parameters",
        "has no effect",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    world_size, overrides, key, expected = RULES[name]
    with pytest.raises(ConfigError) as caught:
        stages(world_size, *overrides)
    (problem,) = caught.value.problems
    assert f"{key}: " in problem
    assert expected in problem


def test_a_preset_s_own_key_is_named_and_null_removes_it():
    ring = ["model.recurrent_layers=2", "training.global_batch_size=16", "parallel.pp_size=2"]
    with pytest.raises(ConfigError, match=r"stage3_param_persistence_threshold: has no effect .* set it to null"):
        load_config("tiny", ring)
    config = load_config("tiny", [*ring, HOLDS]).config
    zero = resolve(config, 2).deepspeed["zero_optimization"]
    assert zero["memory_efficient_linear"] is False, "other keys stay"


@pytest.mark.parametrize("pp_size", [1, 2])
def test_null_in_the_deepspeed_section_means_absent(pp_size, tmp_path):
    run = json.loads(find_config("tiny").read_text())
    run["model"]["recurrent_layers"] = 2
    run["training"]["global_batch_size"] = 16
    run["parallel"]["pp_size"] = pp_size
    zero = {"stage3_param_persistence_threshold": None, "stage3_max_live_parameters": None, "overlap_comm": False}
    found = []
    for section in ({"wall_clock_breakdown": None, "zero_optimization": zero}, {"zero_optimization": None}):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**run, "deepspeed": section}))
        found.append(resolve(load_config(str(path)).config, 2).deepspeed)
    assert found[0]["zero_optimization"].pop("overlap_comm") is False
    assert found[0] == found[1]
    assert None not in [*found[0].values(), *found[0]["zero_optimization"].values()]


@pytest.mark.parametrize("start", [9, 27, 72])
def test_nearest_batches_are_valid_and_nothing_valid_is_nearer(start):
    """Every batch around it is tried, so the search that makes the message cannot skip one."""
    ring = ["parallel.pp_size=4", "training.micro_batch_size=1"]

    def named(size):
        """What the message names; nothing where `size` is valid."""
        try:
            stages(4, *ring, f"training.global_batch_size={size}")
        except ConfigError as error:
            return [int(number) for number in str(error).split("nearest: ")[1].split(" or ")]
        return []

    for size in range(start, start + 9):
        if nearest := named(size):
            assert min(nearest) < size < max(nearest)
            assert not any(named(number) for number in nearest)
            assert all(named(between) for between in range(min(nearest) + 1, max(nearest)))


def test_a_huge_batch_is_answered_at_once():
    with pytest.raises(ConfigError, match=f"nearest: {2 * 10**9} or {2 * 10**9 + 8}"):
        stages(4, "parallel.pp_size=2", f"training.global_batch_size={2 * 10**9 + 2}")


@pytest.mark.parametrize("other", ["training.optimizer=muon", "parallel.offload_params=cpu", "parallel.zero_stage=2"])
def test_a_key_is_named_once(other):
    """Settings that several rules refuse, together."""
    everything = ["parallel.zero_stage=0", "parallel.offload_params=cpu", "training.optimizer=muon", other]
    with pytest.raises(ConfigError) as caught:
        stages(4, "parallel.pp_size=2", "training.muon_lr=0.1", "training.grad_clip=0", *everything)
    keys = [problem.split(": ")[1] for problem in caught.value.problems]
    assert sorted(keys) == ["parallel.offload_params", "parallel.zero_stage", "training.optimizer"]


@pytest.mark.parametrize(
    ("overrides", "world_size", "pp_size", "sizes"),
    [
        (["parallel.pp_size=2"], 4, 2, [2, 2]),
        (["parallel.pp_size=8"], 4, 4, [1, 1, 1, 1]),
        (["parallel.pp_size=8"], 6, 2, [3, 3]),
        (["parallel.pp_size=2"], 1, 1, [1]),
        (["parallel.pp_size=[1,2,1]"], 4, [1, 2, 1], [1, 2, 1]),
        (["parallel.pp_size=[1,2,1]"], 2, 1, [2]),
    ],
)
def test_the_proxy_keeps_what_fits(overrides, world_size, pp_size, sizes):
    proxy, lines = make_proxy(load_config("1t", overrides).config, world_size)
    run = resolve(proxy, world_size)
    assert proxy.parallel.pp_size == pp_size
    assert [stage.size for stage in run.stages] == sizes
    assert run.gradient_accumulation_steps >= len(sizes)
    asked = json.loads(overrides[0].partition("=")[2])
    said = [line for line in lines if line.startswith("proxy: parallel.pp_size: ")]
    assert said == ([] if asked == pp_size else [f"proxy: parallel.pp_size: {asked} -> {pp_size}"])
    if (pp_size, world_size) == (2, 4):
        assert (run.ep_size, proxy.model.prelude_layers, proxy.model.coda_layers) == (2, 2, 2)


def test_the_report_says_what_each_stage_holds():
    run = resolve(load_config("1t", ["parallel.pp_size=4"]).config, 1024)
    report = dry_run_report(run)
    assert "ranks 256-511: prelude 1, recurrent 2-3, coda 2; rows per micro-batch 2" in report
    assert "idle share" in report
