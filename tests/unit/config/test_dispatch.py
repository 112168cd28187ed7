"""Which dispatcher a run takes, and settings of one that would have no effect."""

import pytest

from mythos_ds.config.dispatch import HAS_RUN_ON, choose_dispatch
from mythos_ds.config.loader import load_config
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.resolve import resolve
from mythos_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("ep_size", "per_node", "device", "name", "why"),
    [
        (1, 8, "cpu", "local", "every process holds all experts"),
        (4, 8, "cpu", "per_rank", "one node"),
        (8, 8, "cpu", "per_rank", "one node"),
        (16, 8, "cpu", "per_node", "more than one node"),
        (4, 1, "cpu", "per_rank", "not on whole nodes of several processes"),
        (6, 4, "cpu", "per_rank", "not on whole nodes of several processes"),
        (4, 8, "cuda", "all_to_all", '"per_rank" has never run on cuda'),
        (16, 8, "cuda", "all_to_all", '"per_node" has never run on cuda'),
        (1, 8, "cuda", "local", "every process holds all experts"),
    ],
)
def test_what_auto_chooses(ep_size: int, per_node: int, device: str, name: str, why: str) -> None:
    choice = choose_dispatch("auto", ep_size, per_node, device)
    assert choice.name == name
    assert why in choice.why


def test_what_a_configuration_names_is_taken_without_a_word() -> None:
    for name in HAS_RUN_ON:
        choice = choose_dispatch(name, 16, 8, "cuda")
        assert (choice.name, choice.why) == (name, "")
    assert choose_dispatch("all_to_all", 1, 8, "cuda").why == ""


CLUSTER = ["cluster.gpu=h100", "cluster.nodes=2", "training.global_batch_size=32"]


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.ep_size=1", "parallel.dispatch=per_rank"], 2, "every process holds all experts"),
        (["parallel.dispatch=per_rank"], 1, "every process holds all experts"),
        (["parallel.zero_stage=0", "parallel.dispatch=per_node"], 2, "every process holds all experts"),
        ([*CLUSTER, "cluster.gpus_per_node=4", "parallel.ep_size=4", "parallel.dispatch=per_node"], 8,
         "lie within one node of 4"),
        ([*CLUSTER, "cluster.gpus_per_node=4", "parallel.ep_size=2", "parallel.dispatch=per_node"], 8,
         "lie within one node of 4"),
        ([*CLUSTER, "cluster.gpus_per_node=1", "parallel.ep_size=2", "parallel.dispatch=per_node"], 2,
         "one process on each node"),
        (["parallel.dispatch=deepep", "training.dtype=float32"], 2, "allowed: bfloat16"),
        (["parallel.ep_size=1", "parallel.dispatch=deepep"], 2, "every process holds all experts"),
    ],
)  # fmt: skip
def test_a_dispatcher_without_effect_is_refused(overrides: list[str], processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        resolve(load_config("tiny", overrides).config, processes)
    (problem,) = error.value.problems  # one, though two rules look
    assert "parallel.dispatch: " in problem
    assert problem.code == "MDS281"


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        (["parallel.ep_size=1", "parallel.dispatch=auto"], 2),
        (["parallel.ep_size=2", "parallel.dispatch=per_rank"], 2),
        (["parallel.dispatch=per_rank"], 2),
        ([*CLUSTER, "cluster.gpus_per_node=2", "parallel.ep_size=4", "parallel.dispatch=per_node"], 4),
    ],
)
def test_one_with_effect_is_taken(overrides: list[str], processes: int) -> None:
    resolve(load_config("tiny", overrides).config, processes)


@pytest.mark.parametrize(("overrides", "processes"), [([], 1), (["parallel.ep_size=1"], 2)])
def test_rows_in_eight_bits_that_do_not_travel_are_refused(overrides: list[str], processes: int) -> None:
    with pytest.raises(ConfigError, match="every process holds all experts") as error:
        resolve(load_config("tiny", [*overrides, "parallel.dispatch_dtype=fp8"]).config, processes)
    (problem,) = error.value.problems
    assert "parallel.dispatch_dtype: " in problem
    assert problem.code == "MDS283"
    resolve(load_config("tiny", ["parallel.dispatch_dtype=fp8"]).config, 2)


def test_rows_in_eight_bits_that_a_transport_does_not_take_are_refused() -> None:
    settings = ["parallel.dispatch=deepep", "training.dtype=bfloat16", "parallel.dispatch_dtype=fp8"]
    with pytest.raises(ConfigError, match="whose transport takes bfloat16"):
        resolve(load_config("tiny", settings).config, 2)


@pytest.mark.parametrize(("processes", "expected"), [(1, "training"), (2, "fp8")])
def test_rows_of_a_proxy(processes: int, expected: str) -> None:
    proxy, _ = make_proxy(load_config("1t", ["parallel.dispatch_dtype=fp8"]).config, processes)
    assert proxy.parallel.dispatch_dtype == expected
    resolve(proxy, processes)


@pytest.mark.parametrize(("processes", "expected"), [(1, "all_to_all"), (2, "per_rank")])
def test_a_proxy_stays_on_its_node(processes: int, expected: str) -> None:
    config = load_config("1t", ["parallel.dispatch=per_node"]).config
    proxy, lines = make_proxy(config, processes)
    assert proxy.parallel.dispatch == expected
    assert f"proxy: parallel.dispatch: per_node -> {expected}" in lines
    resolve(proxy, processes)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        ([], 1, "every process holds all experts"),
        (["parallel.ep_size=1"], 2, "every process holds all experts"),
        (["parallel.dispatch=deepep", "training.dtype=bfloat16"], 2, "waits where it sends"),
        (["model.halting=act", "training.ponder_cost=0.001"], 2, 'halting "act"'),
        (["training.micro_batch_size=1"], 2, "micro-batches of 1 sequences"),
        (["training.micro_batch_size=3", "training.global_batch_size=6"], 2, "micro-batches of 3 sequences"),
    ],
)
def test_overlap_that_cannot_be_is_refused(overrides: list[str], processes: int, message: str) -> None:
    config = load_config("tiny", [*overrides, "parallel.overlap=true"]).config
    with pytest.raises(ConfigError, match=message) as error:
        resolve(config, processes)
    (problem,) = error.value.problems
    assert "parallel.overlap: " in problem
    assert problem.code == "MDS282"
    resolve(load_config("tiny", overrides).config, processes)


def test_overlap_in_uneven_pipeline_stages_needs_even_rows_on_each() -> None:
    changes = ["model.recurrent_layers=2", "training.micro_batch_size=1", "training.global_batch_size=24"]
    held = "deepspeed.zero_optimization.stage3_param_persistence_threshold=null"
    stages = ["parallel.pp_size=[1,2,1]", "parallel.ep_size=2", held, *changes]
    with pytest.raises(ConfigError, match="an even number"):
        resolve(load_config("tiny", [*stages, "parallel.overlap=true"]).config, 4)
    resolve(load_config("tiny", [*stages, "training.micro_batch_size=2", "parallel.overlap=true"]).config, 4)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_proxy_has_lanes_where_it_has_experts_elsewhere(processes: int) -> None:
    proxy, _ = make_proxy(load_config("1t", ["parallel.overlap=true"]).config, processes)
    assert proxy.parallel.overlap == (processes > 1)
    assert proxy.training.micro_batch_size == (2 if processes > 1 else 1)
    resolve(proxy, processes)
