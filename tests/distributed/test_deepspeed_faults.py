"""The reproductions of docs/deepspeed.md still show what the page says: each exits with 0 where the fault is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import free_port
from tests.helpers.paths import ROOT

SCRIPTS = ROOT / "docs" / "deepspeed_faults"
PROCESSES = {
    "zero0_expert_norm": 2,
    "blank_step": 1,
    "zero_init_buffers": 1,
    "unknown_key": 1,
    "leaf_after_frozen": 1,
    "gather_order": 1,
}


def test_every_reproduction_is_run():
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_fault_is_still_there(name, tmp_path):
    size, port = PROCESSES[name], free_port()
    ranks = [_start(name, rank, size, port, tmp_path) for rank in range(size)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * size, "\n".join(text[-2000:] for text in outputs)


def _start(name: str, rank: int, size: int, port: int, folder: Path) -> subprocess.Popen:
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1, "TORCH_EXTENSIONS_DIR": folder}
    environment = os.environ | {key: str(value) for key, value in {**launcher, **settings}.items()}
    command = [sys.executable, str(SCRIPTS / f"{name}.py")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
