"""A share of `make fuzz` in the default suite, and that it would notice what it looks for."""

import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.errors import ConfigError
from tests.fuzz import mutators, worker
from tests.fuzz.mutators import Mutation
from tests.fuzz.targets import TARGETS, Case, Target, equal, only_the_key
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import environment


def test_a_share_of_each_target_is_handled():
    words = ["--seed", "1", "--count", str(14 * len(TARGETS)), "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in TARGETS)


def test_a_case_is_the_same_again():
    for seed in range(50):
        first, second = (
            mutators.mutated_json({"a": [1, {"b": "x"}], "c": {"d": 2.5}}, random.Random(seed), "c") for _ in range(2)
        )
        assert first == second


def _run_quietly(case: Case) -> tuple[Mutation, Any]:
    return Mutation("none"), 1


def _slow(case: Case) -> tuple[Mutation, Any]:
    time.sleep(2)
    return Mutation("none"), 1


def _strays(case: Case) -> tuple[Mutation, Any]:
    (case.root / "elsewhere").write_text("x")
    return Mutation("none"), 1


def _executes(case: Case) -> tuple[Mutation, Any]:
    pickle.loads(pickle.dumps(_Canary(str(case.canary))))
    return Mutation("none"), 1


class _Canary:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _differs(case: Case) -> tuple[Mutation, Any]:
    return Mutation("none"), 1 if case.whole else 2


def _raises(error: BaseException) -> Callable[[Case], tuple[Mutation, Any]]:
    def run(case: Case) -> tuple[Mutation, Any]:
        case.names.append("line")
        if case.whole:
            return Mutation("none"), 1
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (_run_quietly, None),
        (_slow, "not done after 0.5 s"),
        (_strays, "written outside of the output: ['elsewhere']"),
        (_executes, "code from the input was executed"),
        (_differs, "exit code 0 with another result"),
        (_raises(KeyError("k")), "KeyError"),
        (_raises(ConfigError("something is wrong")), "a message without file, line or key"),
        (_raises(ConfigError("line 3: something is wrong")), None),
    ],
)
def test_what_is_not_handled_is_noticed(run, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TARGETS, "tried", Target((), run, equal))
    monkeypatch.setattr(worker, "LIMIT_S", 0.5)
    worker.result_of_whole.cache_clear()
    folder = os.getcwd()
    try:
        verdict = worker.run_case(tmp_path / "whole", tmp_path, "tried", 0, 0)
    finally:
        os.chdir(folder)
    assert (verdict.fault is None) == (said is None), verdict
    assert said is None or said in str(verdict.fault)


def test_only_the_key_may_differ():
    whole = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert only_the_key(whole, {**whole, "d": 4}, Mutation("json value", "d"))
    assert only_the_key(whole, {"a": {"b": 1, "c": []}, "d": 3}, Mutation("json value", "c"))
    assert not only_the_key(whole, {**whole, "d": 4}, Mutation("json value", "b"))
    assert only_the_key(whole, {**whole, "d": 4}, Mutation("bytes flip"))
    assert not only_the_key(whole, {"a": {"b": 1}}, Mutation("bytes flip"))
