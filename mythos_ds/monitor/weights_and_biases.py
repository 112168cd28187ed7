"""Weights & Biases as a view of the metrics; the record is metrics.jsonl."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mythos_ds.errors import CheckpointError, ConfigError
from mythos_ds.io import read_json, write_atomic
from mythos_ds.log import get_logger
from mythos_ds.monitor.views import Values, flat

_MODULE = "wandb"
_WAIT_SECONDS = 30

_logger = get_logger(__name__)


def require_wandb(project: str | None) -> None:
    """Raise ConfigError where a project is given and the package is not installed here."""
    if project is not None and find_spec(_MODULE) is None:
        raise ConfigError(
            f"monitor.wandb: {json.dumps(project)} given, and {_MODULE} is not installed: "
            "pip install 'mythos_ds[wandb]', or monitor.wandb=null"
        )


@dataclass
class _Shown:
    """What Weights & Biases was given: the run's id, the last step, and the names that it has."""

    project: str
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    step: int = -1
    names: list[str] = field(default_factory=list)


class WandbWriter:
    """Numbers under the metrics' own names against `step`; entry i of a list is `name/i`.

    The run's id and what was given lie in `record`, so that a run that goes on is the same run there, and steps that it
    has are skipped: what was logged cannot be replaced. Where the server cannot be reached, or no key is known, the
    files stay in `directory`/wandb for `wandb sync`, and training goes on; so it does after any error of wandb.
    """

    def __init__(self, directory: Path, record: Path, project: str, configuration: Path):
        self._record = record
        self._shown = _read(record, project)
        self._run: Any = None
        self._keep()
        self._trying(lambda: self._start(directory, configuration))

    def _start(self, directory: Path, configuration: Path) -> None:
        import wandb  # takes a second, and only one rank writes

        config = json.loads(configuration.read_text(encoding="utf-8")) if configuration.is_file() else {}
        settings = {
            "init_timeout": _WAIT_SECONDS,
            "finish_timeout": _WAIT_SECONDS,
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
        }

        def begin(mode: Any, resume: Literal["allow"] | None = None) -> Any:
            return wandb.init(
                project=self._shown.project,
                id=self._shown.id,
                name=directory.resolve().name,
                dir=str(directory),
                config=config,
                resume=resume,
                settings=wandb.Settings(mode=mode, **settings),
            )

        mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
        if mode in ("online", "shared", "run"):
            try:
                # Asked first, because init would wait for a key to be typed.
                if not wandb.login(prompt=False):
                    raise wandb.errors.AuthenticationError("no key is known; set WANDB_API_KEY, or run: wandb login")
                self._run = begin(mode, "allow")
            except Exception as error:
                _logger.warning(
                    "Weights & Biases is not reached (%s); its files stay in %s: send them with wandb sync",
                    _without_key(error),
                    directory / "wandb",
                )
                wandb.teardown()  # frees the id
                self._run = begin("offline")
        else:
            self._run = begin(mode)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Values) -> None:
        """One row of the numbers that the step does not have yet."""
        self._log(step, flat(values))

    def text(self, step: int, name: str, text: str) -> None:
        """A piece of text, shown as written."""

        self._log(step, {name: text})

    def _log(self, step: int, values: Mapping[str, float | str]) -> None:
        shown = self._shown
        if self._run is None or step < shown.step:
            return
        new = {name: value for name, value in values.items() if step > shown.step or name not in shown.names}
        if new:
            self._shown = _Shown(shown.project, shown.id, step, [*(shown.names if step == shown.step else ()), *new])
            self._keep()  # before it is given: a kill in between loses a row there, and doubles none
            row = {"step": step, **new}
            self._trying(lambda: self._run.log({name: _shown_as(value) for name, value in row.items()}))

    def _keep(self) -> None:
        write_atomic(self._record, json.dumps(asdict(self._shown)) + "\n")

    def close(self) -> None:
        """Send what is left, for half a minute at most; the files stay."""
        if self._run is not None:
            self._trying(self._run.finish)

    def _trying(self, action: Callable[[], object]) -> None:
        """Whatever wandb raises is told, once: it is a view, and training goes on without it."""
        try:
            action()
        except Exception as error:
            self._run = None
            _logger.warning(
                "Weights & Biases failed (%s); training goes on, and this start logs nothing more there",
                _without_key(error),
            )


def _read(record: Path, project: str) -> _Shown:
    try:
        shown = read_json(record, _Shown) if record.is_file() else _Shown(project)
    except CheckpointError as error:
        _logger.warning("%s; Weights & Biases gets a new run", error)
        return _Shown(project)
    return shown if shown.project == project else _Shown(project)


def _shown_as(value: float | str) -> Any:
    import wandb

    return wandb.Html(f"<pre>{escape(value, quote=False)}</pre>", inject=False) if isinstance(value, str) else value


def _without_key(error: Exception) -> str:
    key = os.environ.get("WANDB_API_KEY")
    text = " ".join(str(error).split())
    return text.replace(key, "...") if key else text
