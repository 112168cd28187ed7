"""Folders, pipes, links and empty files in the place of a checkpoint's or a model's files: told at once, by name."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mythos_ds.checkpoint import manifest
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from tests.faults.test_shapes import TINY, TOOLS, call
from tests.helpers.synthetic_checkpoint import write_synthetic

Capture = pytest.CaptureFixture[str]


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch,
    "huge": _huge,
    "zeros": lambda path: path.write_bytes(b"\0" * 4096),
}
LIMIT_SECONDS = 20


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    """A tool that waits for a pipe, or reads without end, fails the test."""
    signal.alarm(LIMIT_SECONDS * 3)
    yield
    signal.alarm(0)


def planted(path: Path, kind: str) -> None:
    """Put something else in a file's place."""
    path.unlink(missing_ok=True)
    KINDS[kind](path)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_model_folder(tmp_path: Path, capsys: Capture, kind: str) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.model", "checksums.json", "model.safetensors.index.json")
    for name in names:
        if (name, kind) == ("tokenizer.model", "huge"):
            continue  # read by what reads tokenizers, which has tests of its own
        folder, output = tmp_path / f"model-{name}", tmp_path / "out"
        shutil.copytree(TINY, folder)
        planted(folder / name, kind)
        capsys.readouterr()
        line = ("--from", "mythos", "--to", "hf", "--input", folder, "--output", output)
        codes = [
            call(TOOLS["convert"], *line),
            call(TOOLS["average"], folder, TINY, "--output", output, "--dry-run"),
            call(TOOLS["inspect"], folder),
            call(TOOLS["verify"], folder),
        ]
        said = capsys.readouterr()
        assert set(codes) <= {0, 1, 2}, name
        assert "Traceback" not in said.err, name
        if name == "tokenizer.model" and kind in ("pipe", "dangling link", "link to itself", "endless device"):
            assert codes[:2] == [2, 2], "nothing is written without the tokenizer that the folder seems to have"
        if codes[0] == 2:
            assert name in said.err, f"{name}: {said.err}"
            assert not output.exists(), name
        shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_checkpoint(tmp_path: Path, capsys: Capture, kind: str) -> None:
    resolved = resolve(load_config("tiny", ["training.micro_batch_size=1"]).config, 1)
    whole = write_synthetic(resolved, tmp_path / "whole" / "checkpoints")
    (tmp_path / "whole" / "manifest.json").write_text("{}")
    names = [manifest.MANIFEST, manifest.STATE, *(path.name for path in sorted(whole.glob("*.pt")))]
    for name in names:
        run, output = tmp_path / f"run-{name}", tmp_path / "out"
        shutil.copytree(tmp_path / "whole", run)
        tag = run / "checkpoints" / whole.name
        planted(tag / name, kind)
        capsys.readouterr()
        codes = [call(TOOLS[tool], tag, "--output", output) for tool in ("merge", "reshard")]
        codes += [call(TOOLS["inspect"], tag)]
        assert codes == [2, 2, 2], name
        assert call(TOOLS["verify"], tag) == 1, name
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert said.err.count(name) >= 3
        assert not output.exists()
