"""A training stage with another dtype, other frozen parameters or loops: weights and moments travel by name, and Adam
goes on as plain torch does from the same tensors."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_distributed

FROZEN = {"frozen": ["embed.*", "prelude.*", "recurrent.injection.*"]}
EP2 = {"ep": 2, "stage": 3}
NO_LORA = {"lora_rank": 0}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frozen": (EP2, {**EP2, "training": FROZEN}),
    "trained again": ({**EP2, "training": FROZEN}, EP2),
    "trained again, ZeRO 1": ({"ep": 2, "stage": 1, "training": FROZEN}, {"ep": 2, "stage": 1}),
    "to float32": ({**EP2, "dtype": "bfloat16"}, EP2),
    "to bfloat16": (EP2, {**EP2, "dtype": "bfloat16"}),
    "more loops": ({**EP2, "model": NO_LORA}, {**EP2, "model": {**NO_LORA, "max_loops": 20}}),
    "fewer loops": ({**EP2, "model": NO_LORA}, {**EP2, "model": {**NO_LORA, "max_loops": 6}}),
    "other settings": (EP2, {**EP2, "training": {"weight_decay": 0.5, "beta2": 0.8}}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("changed")
    pairs = [list(pair) for pair in PAIRS.values()]
    results = run_distributed("tests.distributed.changed_state_cases:work", 2, 600.0, pairs=pairs, folder=str(folder))
    return dict(zip(PAIRS, results[0], strict=True))


@pytest.mark.parametrize("name", PAIRS)
def test_adam_goes_on_as_plain_torch_does(name, found):
    result = found[name]
    assert result["different"] == []
    assert result["moved"] > 1e-3
    exact = name != "to bfloat16"
    assert result["loss"] <= (1e-6 if exact else 5e-3), result
    assert result["norm"] <= (1e-5 if exact else 5e-2), result
    assert result["weight"] <= (1e-5 if exact else 2e-2), result
    assert result["buffer"] <= (1e-6 if exact else 1e-1), result
