"""What runs the acceptance checks: every way in which a check can end, alone, with what it measured before."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mythos_ds.bench.acceptance import AcceptanceCheck, AcceptanceResult, read_results, run_checks, select
from mythos_ds.errors import OptionError
from tests.gpu import registry
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT


def check(name: str, limit_s: float = 60.0, needs_gpu: str | None = None, call: int = 1) -> AcceptanceCheck:
    return AcceptanceCheck(name, call, "An example.", f"tests.gpu.sample_checks:{name}", limit_s, needs_gpu)


ALL = [
    check(name)
    for name in ("passes", "misses_a_bar", "measures_nan", "measures_nothing", "raises", "crashes", "skips",
                 "skips_after_a_miss")
]  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("acceptance")


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, AcceptanceResult]:
    """Of one run of every sample; the one that needs a GPU has none."""
    checks = [check("hangs", 2.0), *ALL, check("absent", needs_gpu="its kernel")]
    return {result.check: result for result in run_checks(checks, output, device="cpu", root=ROOT)}


def test_each_way_to_end(results: dict[str, AcceptanceResult]) -> None:
    assert {name: (result.status, result.reason) for name, result in results.items()} == {
        "hangs": ("fail", "not done after 8 s"),
        "passes": ("pass", ""),
        "misses_a_bar": ("fail", "error: 0.5 nats, at most 0.25"),
        "measures_nan": ("fail", "error: nan, at most 1"),
        "measures_nothing": ("fail", "measured nothing"),
        "raises": ("fail", "RuntimeError: no kernel"),
        "crashes": ("fail", f"ended by signal {int(signal.SIGSEGV)}"),
        "skips": ("skip", "not here"),
        "skips_after_a_miss": ("fail", "error: 0.5 nats, at most 0.25"),
        "absent": ("skip", "needs a GPU: its kernel"),
    }


def test_what_was_measured_before_the_end_is_kept(results: dict[str, AcceptanceResult], output: Path) -> None:
    names = [number["name"] for number in results["passes"].numbers]
    assert names == ["sum", "time", "only reported"]
    assert results["passes"].numbers[1] == {
        "name": "time", "value": 0.25, "unit": "s", "at_most": 1.0, "at_least": 0.0, "equals": None, "ok": True,
    }  # fmt: skip
    assert results["passes"].notes == {"kernels": ["one", "two"]}
    for name in ("raises", "crashes"):
        assert [number["name"] for number in results[name].numbers] == ["before"]
    assert "no kernel\nand more" in (output / "raises.log").read_text()


def test_nothing_of_a_check_outlives_it(results: dict[str, AcceptanceResult]) -> None:
    (left,) = results["hangs"].numbers
    deadline = time.monotonic() + 10
    while Path(f"/proc/{left['value']}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{left['value']}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended; nobody has read its exit code yet
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{left['value']}").exists()


def test_lines_say_what_where_and_with_what(results: dict[str, AcceptanceResult], output: Path) -> None:
    lines = [json.loads(line) for line in (output / "acceptance.jsonl").read_text().splitlines()]
    assert [line["check"] for line in lines] == list(results)
    for line in lines:
        assert line["device"]["kind"] == "cpu"
        assert {"python", "torch", "deepspeed", "mythos_ds"} <= line["versions"].keys()
        assert line["seconds"] >= 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", line["date"])


def test_a_second_run_adds_lines_and_the_last_counts(
    results: dict[str, AcceptanceResult], output: Path, tmp_path: Path
) -> None:
    (output / "acceptance.jsonl").rename(tmp_path / "first.jsonl")
    again = list(run_checks([check("passes")], tmp_path, device="cpu", root=ROOT))
    read = read_results([tmp_path / "first.jsonl", tmp_path / "acceptance.jsonl"])
    assert read["passes"].date == again[0].date
    assert read["raises"].reason == "RuntimeError: no kernel"
    (tmp_path / "other.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(OptionError, match="line 1 is no result"):
        read_results([tmp_path / "other.jsonl"])


def test_a_call_that_is_over_fails_what_is_left(tmp_path: Path) -> None:
    checks = [check("hangs", 90.0), check("passes"), check("passes", call=2)]
    found = list(run_checks(checks, tmp_path, device="cpu", root=ROOT, limit_s=0.5))
    assert [result.status for result in found[:2]] == ["fail", "fail"]
    assert found[0].reason == "not done after 2 s"
    assert found[1].reason == "not begun: the 2 s of call 1 were over; run it by --only passes"
    assert not found[2].reason.startswith("not begun")


def test_checks_are_chosen_by_name_or_call() -> None:
    assert [each.name for each in select(ALL, [], [])] == [each.name for each in ALL]
    assert [each.name for each in select(ALL, ["raises", "passes", "raises"], [])] == ["raises", "passes"]
    assert select(ALL, [], [2]) == []
    with pytest.raises(OptionError) as caught:
        select(ALL, ["rases", "nothing_like_it"], [])
    assert [str(problem).partition(";")[0] for problem in caught.value.problems] == [
        "--only: given 'rases'", "--only: given 'nothing_like_it'",
    ]  # fmt: skip
    assert "did you mean 'raises'?" in str(caught.value)


def acceptance(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tools.gpu_acceptance", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "expert", "--output", "x"], "did you mean 'experts'?"),
        (["--only", "experts", "--output", "x", "--limit", "0"], "--limit: given 0"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], says: str) -> None:
    done = acceptance(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_exit_codes_and_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_main("tools/gpu_acceptance.py").main
    monkeypatch.setattr(registry, "CHECKS", (check("passes"), check("misses_a_bar"), check("skips")))
    assert main(["--device", "cpu", "--output", str(tmp_path), "--only", "passes", "skips"]) == 0
    assert "1 pass, 0 fail, 1 skip" in capsys.readouterr().out
    assert main(["--device", "cpu", "--output", str(tmp_path), "--call", "1"]) == 1
    said = capsys.readouterr()
    assert "1 pass, 1 fail, 1 skip" in said.out
    assert "error: 0.5 nats, at most 0.25" in said.err
    assert main(["--list"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "passes", "misses_a_bar", "skips",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = acceptance("--device", "cuda", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "sees no GPU" in done.stderr


def test_an_interrupt_ends_the_check_and_keeps_the_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu_acceptance", "--device", "cpu", "--output", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("*.measured")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = {path.stem for path in tmp_path.glob("*.measured")}
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert started
    assert process.returncode == 130
    assert "stopped" in said
    assert "Traceback" not in said
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ends meanwhile
            assert str(tmp_path).encode() not in path.read_bytes()


def test_the_registry_names_functions_that_are_there() -> None:
    names = [each.name for each in registry.CHECKS]
    assert len(set(names)) == len(names)
    for each in registry.CHECKS:
        module, function = each.function.split(":")
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert f"\ndef {function}(probe: Probe) -> None:" in path.read_text(), each.name
        assert each.shows.endswith("."), each.name
        assert each.call in (1, 2, 3)
