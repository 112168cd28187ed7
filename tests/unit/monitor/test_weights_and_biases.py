"""Weights & Biases: what an offline run has, what a run that goes on adds, and that no failure stops training."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mythos_ds.errors import ConfigError
from mythos_ds.monitor import weights_and_biases
from mythos_ds.monitor.weights_and_biases import WandbWriter, require_wandb
from tests.helpers.listener import listening

KEY = "0123456789abcdef" * 2 + "01234567"
VALUES: dict[str, float | list[float]] = {"loss": 2.5, "load": [1.0, 3.0]}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key and no settings of the user's; a service of the test's own, which is gone at its end."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def open_writer(folder: Path, project: str = "looped") -> WandbWriter:
    """A writer of the run in `folder`."""
    return WandbWriter(folder, folder / "wandb_run.json", project, folder / "config.resolved.json")


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log after a header of seven bytes."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        parts = (parts if kind in (3, 4) else b"") + content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts


def logged(folder: Path) -> list[dict[str, object]]:
    """The rows of all starts, in order, without wandb's own numbers."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    rows = []
    for path in sorted(folder.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if items:
                rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def all_logged(folder: Path, last_step: int) -> list[dict[str, object]]:
    """The same, once the last step is there: wandb's own process writes a little later."""
    limit = time.monotonic() + 30
    while not any(row["step"] == last_step for row in logged(folder)):
        assert time.monotonic() < limit
        time.sleep(0.1)
    return logged(folder)


def ids(folder: Path) -> set[str]:
    """The runs that wandb has in a folder."""
    return {path.stem.removeprefix("run-") for path in folder.glob("wandb/*run-*/*.wandb")}


def test_a_run_that_goes_on_is_the_same_run_and_repeats_no_step(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.json").write_text('{"training": {"lr": 0.001}}')
    first = open_writer(tmp_path)
    for step in (1, 2, 3):
        first.write(step, VALUES)
    first.write(3, {"loss": 9.0, "validation": 2.0})
    first.close()
    second = open_writer(tmp_path)  # from a checkpoint of step 1
    for step in (2, 3, 4):
        second.write(step, {**VALUES, "validation": 7.0})
    second.text(4, "sample/0", "a <b>")
    second.text(4, "sample/0", "a <b>")
    second.close()
    rows = all_logged(tmp_path, 4)
    whole = {"loss": 2.5, "load/0": 1.0, "load/1": 3.0}
    assert rows[:5] == [
        *({"step": step, **whole} for step in (1, 2, 3)),
        {"step": 3, "validation": 2.0},
        {"step": 4, **whole, "validation": 7.0},
    ]
    assert [(row["step"], row["sample/0._type"]) for row in rows[5:]] == [(4, "html-file")]
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/**/*.html")
    assert "<pre>a &lt;b&gt;</pre>" in page.read_text()
    assert ids(tmp_path) == {json.loads((tmp_path / "wandb_run.json").read_text())["id"]}


def test_another_project_is_another_run(tmp_path: Path) -> None:
    for project in ("one", "two"):
        writer = open_writer(tmp_path, project)
        writer.write(1, VALUES)
        writer.close()
    assert len(ids(tmp_path)) == 2
    (tmp_path / "wandb_run.json").write_text("{")
    open_writer(tmp_path).close()
    assert len(ids(tmp_path)) == 3


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and an address where nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def said() -> Iterator[list[str]]:
    with listening(weights_and_biases.__name__) as heard:
        yield heard


@pytest.mark.parametrize("server", ["no key", "no server"])
def test_without_a_server_the_files_stay_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], capfd, server: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(weights_and_biases, "_WAIT_SECONDS", 3)
    if server == "no server":
        unreachable(monkeypatch)
    writer = open_writer(tmp_path)
    writer.write(1, VALUES)
    writer.close()
    assert [row["step"] for row in all_logged(tmp_path, 1)] == [1]
    (warning,) = said
    assert "wandb sync" in warning
    assert KEY not in warning + "".join(capfd.readouterr())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []


def test_an_error_of_wandb_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    writer = open_writer(tmp_path)

    def fails(*arguments: object, **settings: object) -> None:
        raise ConnectionError(f"refused with {KEY}")

    monkeypatch.setattr(wandb.Run, "log", fails)
    for step in (1, 2):
        writer.write(step, VALUES)
    writer.close()
    (warning,) = said
    assert "training goes on" in warning
    assert KEY not in warning
    monkeypatch.setattr(wandb, "init", fails)
    open_writer(tmp_path).write(3, VALUES)


def test_a_missing_package_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    require_wandb("looped")
    monkeypatch.setattr(weights_and_biases, "find_spec", lambda name: None)
    require_wandb(None)
    with pytest.raises(ConfigError, match=r"monitor.wandb: \"looped\" given, .*pip install 'mythos_ds\[wandb\]'"):
        require_wandb("looped")


def test_it_is_imported_only_where_it_is_asked_for() -> None:
    script = "import sys, mythos_ds.train.run; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
