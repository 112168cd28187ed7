"""The launcher of the distributed tests reports failures and leaves no process behind."""

import os
import time
from typing import Any

import pytest

from tests.helpers.distributed import RankFailedError, run_distributed

HERE = "tests.unit.test_distributed_helper"


def describe(value: int) -> list[Any]:
    return [os.environ["RANK"], os.environ["WORLD_SIZE"], value]


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("wrong on purpose")
    time.sleep(60)


def sleep() -> None:
    time.sleep(60)


def test_results_come_back_by_rank() -> None:
    assert run_distributed(f"{HERE}:describe", 2, 60, value=7) == [["0", "2", 7], ["1", "2", 7]]


def test_a_failing_rank_is_shown_and_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="wrong on purpose"):
        run_distributed(f"{HERE}:fail_on_rank_one", 2, 60)
    assert time.monotonic() - started < 40


def test_a_hanging_run_is_ended() -> None:
    with pytest.raises(RankFailedError, match="did not end within"):
        run_distributed(f"{HERE}:sleep", 1, 8)
