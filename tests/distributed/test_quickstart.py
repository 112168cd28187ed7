"""The main job, whole: tiny trains on real text and learns, and looping deeper than trained does not hurt."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import ROOT
from tests.helpers.pretrain import metrics

TIME_LIMIT_S = 1800


@pytest.mark.slow
def test_tiny_learns_and_extrapolates_in_depth(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29611"]
    job = ["launch/pretrain.py", "--config", "tiny.json", "--run-dir", str(tmp_path / "run")]
    command = [*launcher, *job, f"data.data_dir={tmp_path / 'data'}"]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    out = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    lines = metrics(tmp_path / "run")
    prefix = "validation/loss_at_"
    evaluations = [
        {int(name.removeprefix(prefix)): value for name, value in line.items() if name.startswith(prefix)}
        for line in lines
    ]
    evaluations = [losses for losses in evaluations if losses]
    first, last = evaluations[0][4], evaluations[-1]
    assert math.log(4096) - 0.5 < first < math.log(4096) + 0.5
    assert last[4] <= 0.55 * first, "validation loss falls by at least 45 %"
    assert set(last) == {1, 2, 4, 8, 16, 32}
    assert math.exp(last[8] - last[4]) <= 1.02
    assert math.exp(last[32] - last[4]) <= 1.03
    assert math.exp(last[4] - last[1]) <= 0.99
    steps = [line for line in lines if "router/load_max_mean" in line]
    assert steps[-1]["state/rho_A"] < 1.0
    assert steps[-1]["router/load_max_mean"] < max(line["router/load_max_mean"] for line in steps[:10])
