"""Runs one RunSpec of the study `context`: python -m mythos_ds.lab.context_worker FOLDER

One model is trained on short sequences; each arm goes on from it as a training stage of its own, and is read on long
held-out documents.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from mythos_ds.analysis.position_losses import long_documents, position_losses, position_parts
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, resolve
from mythos_ds.config.schema import ModelConfig, RopeScaling, RunConfig
from mythos_ds.conversion.merge import merged_source, newest_tag
from mythos_ds.data.batches import Batch
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.io import write_json
from mythos_ds.lab.worker import RESULT, Worker, leave, main
from mythos_ds.train.callbacks import CallbackState
from mythos_ds.train.run import RunRequest, train
from mythos_ds.train.summary import RunSummary
from mythos_ds.weights.model_folder import model_of

STAGE = "stage"


class ContextWorker(Worker):
    """The base of a seed and its arms. The spec's task: arms (name to the stage's overrides, `section.key`), scaled
    (name to an arm and a RoPE scaling it is read with, untrained), length and documents of the evaluation."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        assert self.spec.chains is not None, "a spec that names this worker has a task"
        self.task: dict[str, Any] = self.spec.chains
        self.finished = False

    def run(self, environment: ProcessEnvironment) -> None:
        """Train the base and each arm from it, evaluate all, write the result. What is trained is not trained again."""
        self.started = time.perf_counter()
        config, base = self.resolved.config, self.folder / "run"
        if not self.trained(RunRequest.of(self.resolved, self.spec.to_json(), base), environment):
            return
        configs = {"base": config}
        for name, overrides in self.task["arms"].items():
            configs[name] = self.with_overrides(overrides)
            stages = (ResolvedStage(STAGE, resolve(configs[name], 1)),)
            request = RunRequest(stages, self.spec.to_json(), self.folder / name, str(base), (), new_stage=STAGE)
            if not self.trained(request, environment):
                return
        batches = long_documents(config, self.task["length"], self.task["documents"])
        arms = {name: self.losses(name, own.model, batches) for name, own in configs.items()}
        for name, (arm, scaling) in self.task["scaled"].items():
            model = configs[arm].model.model_copy(update={"rope_scaling": RopeScaling.model_validate(scaling)})
            arms[name] = self.losses(arm, model, batches)
        result = {
            "arms": arms,
            "parts": position_parts(self.task["length"]),
            "seconds": time.perf_counter() - self.started,
        }
        write_json(self.folder / RESULT, result)

    def trained(self, request: RunRequest, environment: ProcessEnvironment) -> bool:
        """Train, or go on; whether it came to its end."""
        self.finished = False
        train(request, environment, callbacks=[self])
        return self.finished

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        """Note whether training came to its end; models are evaluated from their checkpoints."""
        self.finished = summary.finished

    def with_overrides(self, overrides: dict[str, Any]) -> RunConfig:
        """The base's configuration with an arm's."""
        file = self.folder / "base.json"
        write_json(file, self.spec.config)
        return load_config(str(file), [f"{key}={json.dumps(value)}" for key, value in overrides.items()]).config

    def losses(self, arm: str, model: ModelConfig, batches: list[Batch]) -> list[list[float]]:
        """The loss of each document's parts at the mean loop count of training."""
        folder = self.folder / ("run" if arm == "base" else arm)
        weights = model_of(merged_source(newest_tag(folder), model, "float32"), model)
        return position_losses(weights, batches, [model.mean_recurrence])[model.mean_recurrence]


if __name__ == "__main__":
    leave(main(sys.argv[1:], ContextWorker))
