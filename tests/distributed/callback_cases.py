"""One training run through the Python entry, with callbacks that note their calls; started on every rank."""

import os
from pathlib import Path
from typing import Any

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import NumericsError
from mythos_ds.parallel.groups import expert_group_name
from mythos_ds.train.callbacks import Callback, CallbackState
from mythos_ds.train.run import RunRequest, train
from mythos_ds.train.summary import RunSummary

STEPS = 3


class Notes(Callback):
    """Notes every call, and the norm of the gradients that can be read after backward."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.norms: list[float] = []
        self.results: list[tuple[float | None, float | None]] = []

    def _note(self, name: str, state: CallbackState, *more: Any) -> None:
        known = [field for field in ("n_loops", "lr", "loss", "grad_norm") if getattr(state, field) is not None]
        self.calls.append([name, state.step, known, *more])

    def before_step(self, state: CallbackState) -> None:
        self._note("before_step", state)

    def after_backward(self, state: CallbackState) -> None:
        self._note("after_backward", state)
        self.norms.append(_norm(state))

    def after_step(self, state: CallbackState) -> None:
        self._note("after_step", state)
        self.results.append((state.loss, state.grad_norm))

    def on_anomaly(self, state: CallbackState) -> None:
        self._note("on_anomaly", state)
        self.results.append((state.loss, state.grad_norm))

    def on_save(self, state: CallbackState, checkpoint: Path) -> None:
        self._note("on_save", state, checkpoint.name, (checkpoint / "manifest.json").is_file())

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        self._note("on_end", state, summary.finished)


def _norm(state: CallbackState) -> float:
    """The global gradient norm: squares of all parameters, each counted once over the ranks that hold it."""
    groups, square = state.engine.groups, 0.0
    experts = expert_group_name(groups.layout.ep_size)
    for parameter in state.model.parameters():
        gradient = state.engine.gradient(parameter)
        copies = groups.layout.dp_size // (
            groups.layout.ep_size if getattr(parameter, "group_name", None) == experts else 1
        )
        square += 0.0 if gradient is None else gradient.double().square().sum().item() / copies
    return groups.sum([square])[0] ** 0.5


def run(folder: str, overrides: list[str], with_callbacks: bool) -> dict[str, Any]:
    """Trains and says what was called; `error` where the run ended with one."""
    environment = ProcessEnvironment.detect(os.environ)
    loaded = load_config("tiny.json", overrides)
    request = RunRequest.of(resolve(loaded.config, environment.world_size), loaded.text, Path(folder))
    notes, other = Notes(), Notes()
    error, summary = "", None
    try:
        summary = train(request, environment, callbacks=[notes, other] if with_callbacks else ())
    except NumericsError as raised:
        error = str(raised)
    return {
        "calls": notes.calls,
        "same": notes.calls == other.calls,
        "norms": notes.norms,
        "results": notes.results,
        "losses": summary.losses if summary is not None else {},
        "error": error,
    }
