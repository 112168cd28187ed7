"""docs/gpu_acceptance.md is made from the checks and the committed results, and says plainly where there are none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mythos_ds.bench.acceptance import AcceptanceCheck, AcceptanceResult, read_results
from mythos_ds.bench.acceptance_page import DATA, PAGE, page, publish
from mythos_ds.errors import OptionError
from tests.gpu.registry import CHECKS
from tests.helpers.paths import ROOT

ONE = AcceptanceCheck("experts", 1, "Experts are right.", "x:y")
TWO = AcceptanceCheck("step", 3, "A step is fast.", "x:y", needs_gpu="time")
GPU = {"kind": "cuda", "name": "NVIDIA X", "memory_bytes": 141e9, "cuda": "13.0"}
NUMBER = {"name": "error", "value": 0.5, "unit": "nats", "at_most": 0.25, "at_least": None, "equals": None, "ok": False}
VERSIONS = {"torch": "2.11.0", "deepspeed": "0.19.8", "python": "3.12.3"}
DATE = "2026-11-29T10:00:00+00:00"
FAILED = AcceptanceResult(
    "experts", 1, "fail", "error: 0.5 nats, at most 0.25", [NUMBER], {}, 12.0, GPU, VERSIONS, "abc", DATE
)  # fmt: skip
PASSED = replace(FAILED, check="step", call=3, status="pass", reason="", date="2026-11-30T10:00:00+00:00")


def write(path: Path, *results: AcceptanceResult) -> Path:
    path.write_text("".join(json.dumps(vars(result)) + "\n" for result in results))
    return path


def test_the_committed_page_is_current() -> None:
    committed = ROOT / "docs" / DATA
    results = read_results([committed]) if committed.is_file() else {}
    assert (ROOT / "docs" / PAGE).read_text() == page(CHECKS, results)


def test_without_results_the_page_says_so_and_lists_the_checks() -> None:
    text = page(CHECKS, {})
    assert "**Not run yet on a GPU.**" in text
    for check in CHECKS:
        assert f"| `{check.name}` | {check.shows} | {'skipped' if check.needs_gpu else 'at small size'} |" in text


def test_results_are_published_with_device_numbers_and_failures(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", FAILED, replace(PASSED, status="fail", reason="too slow"))
    said = publish([ONE, TWO], [first, write(tmp_path / "second.jsonl", PASSED)], tmp_path)
    assert said.splitlines() == [f"{tmp_path / PAGE}: written", f"{tmp_path / DATA}: written"]
    text = (tmp_path / PAGE).read_text()
    assert "Run on 2026-11-29 to 2026-11-30: 1 pass, 1 fail, 0 skip, 0 not run." in text
    assert "NVIDIA X, 141 GB, torch 2.11.0, CUDA 13.0, DeepSpeed 0.19.8, Python 3.12.3. Commit abc." in text
    assert "| `experts` | Experts are right. | **fail**: error: 0.5 nats, at most 0.25 | 12 |" in text
    assert "| `step` | A step is fast. | pass | 12 |" in text
    assert "| experts | error | 0.5 nats | at most 0.25 |" in text
    assert "Not run yet" not in text
    assert [result.status for result in read_results([tmp_path / DATA]).values()] == ["fail", "pass"]
    assert publish([ONE, TWO], [], tmp_path) == f"{tmp_path / PAGE}: written\n"
    assert (tmp_path / PAGE).read_text() == text


def test_a_check_without_a_result_is_not_run(tmp_path: Path) -> None:
    text = page([ONE, TWO], {"experts": FAILED})
    assert "0 pass, 1 fail, 0 skip, 1 not run" in text
    assert "| `step` | A step is fast. | not run | |" in text


def test_results_of_a_cpu_and_of_other_checks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="experts ran without a GPU"):
        publish([ONE], [write(tmp_path / "cpu.jsonl", replace(FAILED, device={"kind": "cpu"}))], tmp_path)
    with pytest.raises(OptionError, match="no check 'step'"):
        publish([ONE], [write(tmp_path / "other.jsonl", PASSED)], tmp_path)
    assert not (tmp_path / PAGE).exists()
