"""Runs one RunSpec of the study `retrofit`: python -m mythos_ds.lab.smollm.worker FOLDER

A cut of SmolLM2-135M is trained, or only evaluated, through the project's trainer. The models that runs start from, and
the text in their tokens, are made once, beside the runs.
"""

import sys
import time
from pathlib import Path
from typing import Any

from mythos_ds.analysis.loop_losses import as_json, held_out_sequences, sequence_losses
from mythos_ds.config.resolve import resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.conversion.convert import Request, plan_route
from mythos_ds.conversion.merge import merged_source, newest_tag
from mythos_ds.conversion.starting_weights import open_starting_weights
from mythos_ds.data.builtin import prepare_builtin
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.readers import read_files
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.io import published_directory, write_json
from mythos_ds.lab.smollm.source import CACHE, require_source
from mythos_ds.lab.worker import RESULT, Worker, leave, main
from mythos_ds.train.callbacks import CallbackState
from mythos_ds.train.run import RunRequest, train
from mythos_ds.train.summary import RunSummary
from mythos_ds.weights.model_folder import load_model, model_of
from mythos_ds.weights.writer import write_tensors


class RetrofitWorker(Worker):
    """A run from a cut of the model. The spec's task: cut (values by name in CUT_FLAGS), sequences, and train, which is
    False for one that is evaluated only."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        assert self.spec.chains is not None, "a spec that names this worker has a task"
        self.task: dict[str, Any] = self.spec.chains
        self.finished = False
        self.core_seconds = 0.0

    def run(self, environment: ProcessEnvironment) -> None:
        """Make what the run starts from, train, evaluate, write the result."""
        source = require_source(CACHE)
        shared = self.folder.parent.parent / "smollm"
        config = self.complete(self.start_model(source, shared), self.tokens(source, shared), shared)
        if self.task["train"]:
            self.resolved = resolve(config, 1)
            request = RunRequest.of(self.resolved, config.model_dump_json(), self.folder / "run")
            self.started, before = time.perf_counter(), time.process_time()
            train(request, environment, open_weights=open_starting_weights, callbacks=[self])
            self.core_seconds = time.process_time() - before
            if not self.finished:
                return
            model = model_of(merged_source(newest_tag(self.folder / "run"), config.model, "float32"), config.model)
        else:
            model = load_model(config.training.init_from or "")
        seconds = time.perf_counter() - self.started
        batches = held_out_sequences(config, self.task["sequences"])
        losses = sequence_losses(model, batches, self.spec.loops)
        tokens = self.resolved.tokens_per_step * self.resolved.max_steps if self.task["train"] else 0
        decay = model.recurrent.injection.decay()
        write_json(
            self.folder / RESULT,
            {
                **as_json(losses, batches),
                "seconds": seconds,
                "core_seconds": self.core_seconds,
                "tokens": tokens,
                "decay": [float(decay.min()), float(decay.mean()), float(decay.max())],
            },
        )

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        """Note whether training came to its end; the model is evaluated from its checkpoint, in fp32."""
        self.finished = summary.finished

    def complete(self, model: Path, tokens: Path, shared: Path) -> RunConfig:
        """The spec's configuration with what lies where."""
        raw = {**self.spec.config, "training": {**self.spec.config["training"], "init_from": str(model)}}
        data = {"datasets": [{"prefix": str(tokens)}], "tokenizer": str(model), "data_dir": str(shared)}
        return RunConfig.model_validate({**raw, "data": {**self.spec.config["data"], **data}})

    def start_model(self, source: Path, shared: Path) -> Path:
        """The folder of the spec's cut."""
        cut = self.task["cut"]
        folder = shared / "_".join(f"{name}{value}" for name, value in sorted(cut.items()))
        if not folder.is_dir():
            route = plan_route(Request("hf", "mythos", source, None, cut=cut))
            with published_directory(folder) as work:
                write_tensors(route.source, work)
                route.finish(work)
        return folder

    def tokens(self, source: Path, shared: Path) -> Path:
        """The built-in corpus in the source's tokens."""
        folder = shared / "tokens"
        if not folder.is_dir():
            corpus = prepare_builtin(shared).folder / "corpus.jsonl"
            with published_directory(folder) as work:
                prepare_dataset(
                    read_files([corpus]),
                    tokenizer_path=source,
                    prefix=work / "text",
                    workers=1,
                    shuffle_seed=None,  # shuffled already
                    sources=("builtin",),
                )
        return folder / "text"


if __name__ == "__main__":
    leave(main(sys.argv[1:], RetrofitWorker))
