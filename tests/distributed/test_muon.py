"""Muon under ZeRO and expert parallelism trains what its formulas say; Adam gets embedding, head, router and LoRA."""

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.errors import ConfigError
from tests.helpers.distributed import run_distributed

CASES = {
    2: [{"ep": 2, "stage": 3}, {"ep": 1, "stage": 3}, {"ep": 2, "stage": 1}, {"ep": 1, "stage": 2}],
    4: [{"ep": 2, "stage": 3}, {"ep": 2, "stage": 2}],
}
MUON = ["training.optimizer=muon", "training.muon_lr=0.02", "training.grad_clip=0"]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_equals_its_formulas(world_size: int) -> None:
    cases = CASES[world_size]
    for results in run_distributed("tests.distributed.muon_cases:compare", world_size, 600, cases=cases):
        for case, found in zip(cases, results, strict=True):
            assert found["loss"] <= 1e-5, (case, found["loss"])
            assert all(deviation <= 1e-4 for deviation in found["weight"].values()), (case, found["weight"])
            assert found["moved"]["recurrent.layers.0.moe.experts.w1"] > 1e-3, "experts must move"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*MUON[:2], "training.grad_clip=1.0"], "training.grad_clip"),
        (MUON[:1] + MUON[2:], "training.muon_lr"),
        ([*MUON, "parallel.zero_stage=0"], "zero_stage 0"),
        ([*MUON, "parallel.offload_optimizer=cpu"], "offload"),
        (["training.muon_lr=0.02"], "has no effect"),
    ],
)
def test_what_muon_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(load_config("tiny.json", overrides).config, 2)


def test_muon_is_refused_for_large_models() -> None:
    with pytest.raises(ConfigError, match="routed parameters"):
        resolve(load_config("50b.json", MUON).config, 256)
    assert resolve(load_config("3b.json", MUON).config, 32).deepspeed["zero_optimization"]["reduce_scatter"] is False
