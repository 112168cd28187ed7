"""What the sides of a comparison run."""

from typing import Any

import pytest

from mythos_ds.bench import step
from mythos_ds.errors import OptionError

LAYER, NONE = "parallel.activation_checkpointing=layer", "parallel.activation_checkpointing=none"
TIMES = {"processes": 1, "steps": 1, "repetitions": 2}


def test_recomputation_is_timed_against_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[dict[str, Any]] = []

    def run(case: dict[str, Any]) -> dict[str, Any]:
        cases.append(case)
        return {"seconds": [1.3 if case["side"] == "deepspeed" else 1.0], "idle": []}

    monkeypatch.setattr(step, "_run", run)
    result = step.compare_steps("tiny.json", [LAYER], against="unrecomputed", **TIMES)
    assert [case["overrides"] for case in cases] == [[LAYER], [LAYER, NONE]] * 2
    assert result["ratio_deepspeed_to_unrecomputed"] == pytest.approx(1.3)


def test_nothing_is_timed_against_itself() -> None:
    with pytest.raises(OptionError, match="allowed"):
        step.compare_steps("tiny.json", [NONE], against="unrecomputed", **TIMES)
