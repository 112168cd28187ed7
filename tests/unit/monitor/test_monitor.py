"""The record, the TensorBoard view and the progress line."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from mythos_ds import log
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.monitor.metrics import MetricsWriter
from mythos_ds.monitor.progress import ProgressLine
from mythos_ds.monitor.tensorboard import TensorBoardWriter
from mythos_ds.monitor.throughput import Throughput, peak_flops


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write(1, {"loss": 2.5, "load": [1.0, float("nan")], "norm": float("inf")})
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": 2.5, "load": [1.0, None], "norm": None}
    writer.close()


def test_resuming_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    writer = MetricsWriter(path)
    writer.truncate_after(1)
    writer.write(2, {"loss": 1.5})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.5},
    ]


def test_tensorboard_shows_the_same_names(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.write(4, {"loss": 2.5, "load": [1.0, 3.0]})
    writer.text(4, "sample", "a <b>\n")
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "load/0", "load/1"}
    assert [(event.step, event.value) for event in events.Scalars("load/1")] == [(4, 3.0)]


def test_the_plain_progress_line_holds_every_number() -> None:
    out = io.StringIO()
    line = ProgressLine(20, True, console=Console(file=out, width=200))
    line.update(9, loss=3.0, n_loops=2)
    assert out.getvalue() == "", "without a terminal only logged steps are printed"
    values: dict[str, float | list[float]] = {
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.7,
        "n_loops": 4,
        "tokens_per_second": 12345.0,
        "load": [1.0],
    }
    line.log(10, values)
    line.close()
    for part in ("step 10/20", "loss 2.5000", "12,345 tok/s", "lr 1.00e-03", "4 loops", "|g| 0.700", "left"):
        assert part in out.getvalue()


def test_a_live_line_and_a_silent_rank(capsys) -> None:
    out = io.StringIO()
    line = ProgressLine(20, True, console=Console(file=out, width=200, force_terminal=True))
    line.log(20, {"loss": 2.5})
    line.close()
    assert "20/20" in out.getvalue()
    assert "loss 2.5000" in out.getvalue()
    silent = ProgressLine(20, False)
    silent.log(1, {"loss": 1.0})
    silent.close()
    assert capsys.readouterr().out == ""


def test_peak_memory_counts_what_a_process_held() -> None:
    script = (
        "from mythos_ds.monitor.memory import peak_memory_bytes as peak\n"
        "before = peak(); block = bytearray(b'x' * (256 << 20)); del block\n"
        "assert peak() - before > 200 << 20, (before, peak())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_utilisation_is_left_out_where_the_peak_is_unknown() -> None:
    resolved = resolve(load_config("tiny", []).config, 2)
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    found = Throughput(resolved, None)
    found.add(n_loops=4, seconds=2.0, sequences=8)
    assert found.read() == {"tokens_per_second": 8 * resolved.config.training.seq_len / 2.0}
    found = Throughput(resolved, 1e9)
    found.add(n_loops=4, seconds=2.0, sequences=8)
    assert found.read()["mfu"] > 0


def test_deepspeed_says_nothing_of_the_cpu_where_there_is_no_gpu(monkeypatch, tmp_path) -> None:
    said = []
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record) if logger.filter(record) else None)
    text = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
    (tmp_path / "gpu").touch()
    for devices, count in (((str(tmp_path / "gpu"),), 1), ((), 0)):
        monkeypatch.setattr(log, "_DEVICES", devices)
        log.quiet_without_gpu()
        said.clear()
        logger.warning(text)
        assert len(said) == count
    logger.warning("another")
    assert [record.getMessage() for record in said] == ["another"]
