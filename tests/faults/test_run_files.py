"""Who may read what a run leaves, and that no path of this disk is in what is handed on."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

from tests.helpers.pretrain import SMALL, environment, small_data

WORLD, WRITE = 0o007, 0o022


def modes(folder: Path) -> dict[str, int]:
    """Permissions of a folder and all in it."""
    return {str(path): stat.S_IMODE(path.lstat().st_mode) for path in [folder, *folder.rglob("*")]}


def test_a_run_is_for_its_group_and_what_is_shared_for_all(tmp_path):
    run, outputs = tmp_path / "runs" / "run", [tmp_path / "merged", tmp_path / "shared"]
    words = ["pretrain", "--config", "tiny", "--run-dir", str(run), *SMALL, *small_data(tmp_path)]
    commands = [[*words, "training.max_steps=2", "training.warmup_steps=0"]]
    commands += [["merge", str(run), "--output", str(outputs[0])]]
    commands += [["merge", str(run), "--output", str(outputs[1]), "--share"]]
    former = os.umask(0o022)
    try:
        for command in commands:
            done = subprocess.run(
                [sys.executable, "-m", "mythos_ds", *command],
                env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        os.umask(former)
    for folder, share in ((tmp_path / "runs", False), (outputs[0], False), (outputs[1], True)):
        found = modes(folder)
        assert len(found) > 3
        open_to_all = {path for path, mode in found.items() if mode & WORLD}
        assert bool(open_to_all) == share, open_to_all
        assert not [path for path, mode in found.items() if mode & WRITE]
    text = (outputs[0] / "config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert json.loads(text)["facts"]["data"]["data_dir"] == tmp_path.name
