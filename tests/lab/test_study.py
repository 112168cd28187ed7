"""A small study from end to end, by its command: what docs/lab holds comes out again; a second run repeats nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mythos_ds.errors import LabError
from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.studies.language import base
from mythos_ds.lab.sweep import run_all, run_folder, start_run
from tests.helpers.paths import ROOT

STUDY = "khop-smoke"


def _lab(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "lab.py"), *arguments]
    places = ["--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    return subprocess.run([*command, *places], capture_output=True, text=True, timeout=600, cwd=ROOT)


def _written(folder: Path) -> dict[str, int]:
    """When the files of the runs were written, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_committed_figures_come_out_of_the_command(tmp_path: Path) -> None:
    result = _lab(tmp_path, "khop", "--scale", "smoke")
    assert result.returncode == 0, result.stderr
    made, committed = (
        json.loads((folder / STUDY / "results.json").read_text())["numbers"]
        for folder in (tmp_path / "docs", ROOT / "docs" / "lab")
    )
    assert made.keys() == committed.keys()
    for arm, (own,) in made.items():
        (other,) = committed[arm]
        assert own["parameters"] == other["parameters"]
        # From Python 3.12 on, sum() of floats keeps what it rounds off.
        assert own["training_flops"] == pytest.approx(other["training_flops"], rel=1e-12)
        for loops, values in own["accuracy"].items():
            # Sums differ in their last bits between processors, and training carries that on.
            close = [abs(a - b) <= 0.2 for a, b in zip(values, other["accuracy"][loops], strict=True)]
            assert sum(close) >= 0.9 * len(close), (arm, loops, values, other["accuracy"][loops])
    assert (tmp_path / "docs" / STUDY / "khop.png").stat().st_size > 10_000

    written = _written(tmp_path / "runs")
    assert written
    assert _lab(tmp_path, "khop", "--scale", "smoke").returncode == 0
    assert _written(tmp_path / "runs") == written, "nothing is trained again"
    assert _lab(tmp_path, "report").returncode == 0
    report = (tmp_path / "docs" / "report.html").read_text()
    assert "<table>" in report
    assert "data:image/png;base64," in report


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("loops", "--scale", "smoke"), "allowed for loops: cpu, gpu"), (("report",), "no results yet")],
)
def test_bad_input_is_one_message(tmp_path: Path, arguments: tuple[str, ...], named: str) -> None:
    result = _lab(tmp_path, *arguments)
    assert result.returncode == 2
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def _spec(tmp_path: Path, **overrides: object) -> RunSpec:
    small = {"training.max_steps": 3, "training.warmup_steps": 1, "training.seq_len": 32, "training.eval_batches": 1}
    chains = {"entities": 4, "relations": 3, "train_hops": 3, "test_hops": 31, "table_seed": 0}
    arm = Arm("x", "x", {**small, **overrides})
    return make_spec(base("cpu"), arm, 0, loops=(1, 2), data_dir=str(tmp_path / "data"), chains=chains)


def test_a_run_that_stops_being_finite_is_a_result(tmp_path: Path) -> None:
    spec = _spec(tmp_path, **{"training.lr": 1e6, "training.grad_clip": 0.0, "training.warmup_steps": 0})
    result = run_all({"x": spec}, tmp_path, jobs=1, limit_s=200)["x"]
    assert "step" in result["diverged"]


def test_a_run_that_fails_is_reported_with_its_log(tmp_path: Path) -> None:
    spec = _spec(tmp_path)
    broken = RunSpec(spec.config, "no such control", spec.chains, spec.loops)
    with pytest.raises(LabError, match="no such control"):
        run_all({"x": broken}, tmp_path, jobs=1, limit_s=200)
    with pytest.raises(LabError, match="still running after 0 s"):
        run_all({"x": spec}, tmp_path, jobs=1, limit_s=0.4)
    assert run_folder(tmp_path, spec).is_dir()


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    spec = _spec(tmp_path, **{"training.max_steps": 60, "monitor.log_interval": 1})
    folder = run_folder(tmp_path, spec)
    process = start_run(folder, spec)
    metrics, limit = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("grad_norm") > 5):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not (folder / "result.json").exists()
    resumed = run_all({"x": spec}, tmp_path, jobs=1, limit_s=200)["x"]
    whole = run_all({"x": spec}, tmp_path / "whole", jobs=1, limit_s=200)["x"]
    assert [step for step, _ in resumed["curve"]] == list(range(1, 61))
    assert resumed["curve"] == whole["curve"]
    assert resumed["accuracy"] == whole["accuracy"]


def test_a_run_is_named_by_what_its_result_depends_on(tmp_path: Path) -> None:
    assert _spec(tmp_path).key == _spec(tmp_path / "elsewhere").key
    assert _spec(tmp_path).key != _spec(tmp_path, **{"training.lr": 1e-3}).key
    again = RunSpec.from_json(_spec(tmp_path).to_json())
    assert again.key == _spec(tmp_path).key
