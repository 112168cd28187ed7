"""Compiled regions give what they give as written, in every kind of layout and at changing depths: slow, each rank
calls a C++ compiler. Every region is compiled whole: a break of its graph would be an error."""

from typing import Any

import pytest

from tests.helpers.distributed import run_distributed
from tests.unit.kernels.test_compiled_regions import COMPILER, GRADIENT, LOSS

MODULE = "tests.distributed.compilation_cases"
TIMEOUT_S = 900.0
CASES: list[dict[str, Any]] = [
    {"ep": 1, "stage": 3},
    {"ep": 2, "stage": 3, "checkpointing": "layer"},
    {"ep": 2, "stage": 1, "checkpointing": "none", "per_sequence": True},
    # DeepSpeed numbers modules per process, and compares the numbers over all ranks without a pipeline: it comes last.
    {"ep": 1, "stage": 3, "pp": 2, "accumulation": 4},
]
OF_EVERY_LAYER = {"add_rms_norm", "rms_norm", "router_scores", "routing_weights", "rotate", "sort_by_expert", "swiglu"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler for the inductor")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each of two ranks found in each layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        return run_distributed(f"{MODULE}:compared", 2, TIMEOUT_S, cases=CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_compiled_is_as_written(number: int, found: list[list[dict[str, Any]]]) -> None:
    for rank in found:
        own = rank[number]
        assert not own["compiled_without"]
        assert own["compiled"], "regions were compiled"
        assert own["gradients"] >= 4 * 10
        assert len(set(own["losses"])) == len(own["losses"])
        assert own["loss"] <= LOSS
        assert own["gradient"] <= GRADIENT


def test_every_layer_has_its_regions_compiled(found: list[list[dict[str, Any]]]) -> None:
    for rank in found:
        for own in rank:
            assert set(own["compiled"]) >= OF_EVERY_LAYER
