"""Runs one RunSpec in this process, through the project's trainer: python -m mythos_ds.lab.worker FOLDER

FOLDER holds spec.json; what comes out is result.json and the trained model. Started again it goes on, and a finished
run is not repeated.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.costs.flops import expected_flops_per_token
from mythos_ds.engine.build import Adapt
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import MythosError, NumericsError
from mythos_ds.io import write_atomic
from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.tasks.chains import ChainLoader, accuracy, task_from
from mythos_ds.lab.variants import CONTROLS
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.provenance import git_commit, package_versions
from mythos_ds.resilience.failure import fail
from mythos_ds.train.callbacks import Callback, CallbackState
from mythos_ds.train.data_loader import DataLoader, TextLoader
from mythos_ds.train.run import RunRequest, train
from mythos_ds.train.run_manifest import RunManifest
from mythos_ds.train.summary import RunSummary
from mythos_ds.weights.model_folder import save_model

SPEC, RESULT, MODEL = "spec.json", "result.json", "model"
_TEST_CHAINS = 1000


class Worker(Callback):
    """One run and its result."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spec = RunSpec.from_json((folder / SPEC).read_text(encoding="utf-8"))
        self.resolved = resolve(RunConfig.model_validate(self.spec.config), 1)
        self.result: dict[str, Any] = {"finished": False}
        self.started = time.perf_counter()

    def run(self, environment: ProcessEnvironment) -> None:
        """Train to the end and write the result; a run whose numbers stop being finite is a result too."""
        request = RunRequest.of(self.resolved, self.spec.to_json(), self.folder / "run")
        try:
            train(request, environment, open_data=self.open_data, adapt=self.adapt(), callbacks=[self])
        except NumericsError as error:
            self.result = {"finished": True, "diverged": str(error).splitlines()[0]}
        if self.result["finished"]:
            self.result |= self.curve_and_cost()
            write_atomic(self.folder / RESULT, json.dumps(self.result, indent=2) + "\n")

    def adapt(self) -> Adapt | None:
        """What makes the spec's variant of a new model."""
        return None if self.spec.control is None else CONTROLS[self.spec.control]

    def open_data(self, resolved: ResolvedRun, manifest: RunManifest, groups: ParallelGroups, step: int) -> DataLoader:
        """The data of the run's task."""
        if self.spec.chains is not None:
            data: DataLoader = ChainLoader(task_from(self.spec.chains), resolved, manifest, groups)
        else:
            data = TextLoader.open(resolved, manifest, groups, step)
        self.started = time.perf_counter()
        return data

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        """Evaluate and keep the trained model. Does nothing after an interruption."""
        if not summary.finished:
            return
        self.result = {"finished": True, "seconds": time.perf_counter() - self.started}
        losses = dict(summary.losses)
        self.result |= self.evaluate(state.engine, state.data, losses)
        self.result["losses"] = dict(sorted(losses.items()))
        self.result["parameters"] = sum(parameter.numel() for parameter in state.model.parameters())
        save_model(state.model, self.folder / MODEL, {"control": self.spec.control, "losses": self.result["losses"]})

    def evaluate(self, engine: TrainingEngine, data: DataLoader, losses: dict[int, float]) -> dict[str, Any]:
        """What else the trained model is judged by; for text, the spec's loop counts are added to `losses`."""
        if self.spec.chains is not None:
            task = task_from(self.spec.chains)
            seed = self.resolved.config.training.seed
            return {"accuracy": accuracy(engine, task, self.spec.loops, chains=_TEST_CHAINS, seed=seed)}
        for n_loops in set(self.spec.loops) - set(losses):
            values = [engine.eval_loss(batches, n_loops) for batches in data.validation()]
            losses[n_loops] = sum(values) / len(values)
        return {}

    def curve_and_cost(self) -> dict[str, Any]:
        """Reads what else a table shows: the training curve, cost, and where it ran."""
        text = (self.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
        flops = expected_flops_per_token(self.resolved.config, self.resolved.mean_backprop_depth)
        return {
            "curve": [[line["step"], line["loss"]] for line in lines],
            "last": lines[-1] if lines else {},
            "training_flops": flops.training * self.resolved.tokens_per_step * self.resolved.max_steps,
            "forward_flops_per_token": flops.forward + flops.attention,
            "tokens": self.resolved.tokens_per_step * self.resolved.max_steps,
            "commit": git_commit(),
            "versions": package_versions(),
            "machine": platform.machine(),
        }


def main(arguments: list[str], kind: type[Worker] = Worker) -> int:
    """Exit code 0, or 2 with the message on stderr."""
    environment: ProcessEnvironment | None = None
    try:
        environment = ProcessEnvironment.detect(os.environ)
        kind(Path(arguments[0])).run(environment)
    except MythosError as error:
        return fail(error, environment)
    return 0


def leave(code: int) -> NoReturn:
    """End the process: threads of a process group now and then abort the interpreter's own way out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
