"""SmolLM2-135M made into a looped model and trained, from conversion to an answer of the export."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_ds.analysis.loop_losses import held_out_sequences
from mythos_ds.config.loader import load_config
from mythos_ds.io import write_json
from mythos_ds.lab.smollm.checks import QUESTION, chat_tokens, source_difference
from mythos_ds.lab.smollm.questions import answers, write_questions
from mythos_ds.lab.smollm.source import make_source
from mythos_ds.lab.smollm.steps import Steps

TRAINED_LOOPS = (1, 2, 3, 4, 8)
UNTRAINED_LOOPS = (1, 2, 4)
STEPS = 72
EQUAL_COMPUTE = 1.28
"""FLOPs of the recipe's mean step over those of the same step at one loop; frozen parts count forward only."""
_CUT = {"prelude": 12, "recurrent": 10, "coda": 8, "decay": 0.05}
_NEGATIVE = {"prelude": 10, "recurrent": 10, "coda": 10, "decay": 0.447}
_CONTROL = (
    "model.mean_recurrence=1",
    "training.depth_distribution=fixed",
    "training.mean_backprop_depth=1",
)
_NEW_TOKENS = 24


@dataclass(frozen=True)
class Settings:
    """Where and on what it runs. dtype: of training; work: a folder for all that is made."""

    cache: Path
    work: Path
    dtype: str
    processes: int
    sequences: int


def fastest_dtype() -> str:
    """bfloat16 where the processor multiplies matrices in it, else float32."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        words = set()
    return "bfloat16" if words & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


class RecipeRun:
    """The steps. What each gives is kept in the work folder, and done steps are skipped."""

    def __init__(self, settings: Settings):
        self.settings, self.work = settings, settings.work
        self.steps = Steps(settings.work)
        cores = os.cpu_count() or 1
        self.all_threads, self.rank_threads = cores, max(1, cores // settings.processes)
        self.source = make_source(settings.cache)

    def main(self) -> dict[str, Any]:
        """The recipe with seed 0, untrained and trained, and its export."""
        self.prepare_data()
        self.loop_from_dense("looped", _CUT)
        results: dict[str, Any] = {"source": self.checked_source()}
        results["untrained"] = self.evaluate("untrained", self.work / "looped", UNTRAINED_LOOPS)
        results["trained"] = self.train("trained", "looped", [])
        results["chat"] = self.export_and_chat()
        return results

    def full(self) -> dict[str, Any]:
        """What else is compared: a second seed, the source trained at one loop on equal tokens and at equal compute,
        and a cut with the sink in the block and a large A."""
        longer = f"training.max_steps={round(STEPS * EQUAL_COMPUTE)}"
        results = {
            "control": self.train("control", "looped", _CONTROL),
            "trained_1": self.train("trained_1", "looped", ["training.seed=1"]),
            "control_1": self.train("control_1", "looped", [*_CONTROL, "training.seed=1"]),
            "control_compute": self.train("control_compute", "looped", [*_CONTROL, longer]),
        }
        self.loop_from_dense("negative", _NEGATIVE)
        results["negative_untrained"] = self.evaluate("negative_untrained", self.work / "negative", UNTRAINED_LOOPS)
        results["negative"] = self.train("negative_trained", "negative", [])
        return results

    def tuned(self) -> dict[str, Any]:
        """The untrained cut, tuned on questions and answers; its losses on held-out answers, and answers of its own."""
        questions, held = self.work / "questions.jsonl", self.work / "held_out_questions.json"
        if not held.is_file():
            write_questions(questions, held)
        options = ["--chat", "--tokenizer", self.source, "--output", self.work / "conversations", "--overwrite"]
        command = ["prepare-data", questions, *options, "--workers", self.all_threads]
        self.steps.run("conversations", command, threads=1)
        self.loop_from_dense("tuning_start", _CUT, "conversations", ["data.document_mask=true", "data.split=[88,12,0]"])
        results: dict[str, Any] = {
            "untuned": self.evaluate("untuned", self.work / "tuning_start", (1, 2), "tuning_start")
        }
        results["tuned"] = self.train("tuned", "tuning_start", [], "tuning_start")
        results["tuned_chat"] = self.export_and_chat("tuned", "tuned_")
        kept = self.work / "answers.json"
        if not kept.is_file():
            asked = json.loads(held.read_text(encoding="utf-8"))
            write_json(kept, [answers(self.work / "tuned", asked, loops) for loops in (1, 2)])
        results["answers"] = json.loads(kept.read_text(encoding="utf-8"))
        return results

    def prepare_data(self) -> None:
        """The built-in corpus in the source's own tokens."""
        data = self.work / "data"
        self.steps.run("corpus", ["build-corpus", "--data-dir", data], threads=1)
        corpus = data / "builtin" / "corpus.jsonl"
        options = ["--tokenizer", self.source, "--output", self.work / "tokens", "--keep-order", "--overwrite"]
        self.steps.run("tokens", ["prepare-data", corpus, *options, "--workers", self.all_threads], threads=1)

    def loop_from_dense(self, name: str, cut: dict[str, float], data: str = "tokens", more: Sequence[str] = ()) -> None:
        """The looped model and its run file. data: the prepared dataset in the work folder; more: overrides."""
        options = [text for key, value in cut.items() for text in (f"--{key}", value)]
        overrides = [
            "data.split=[97,3,0]",
            f"data.data_dir={self.work / 'data'}",
            f"training.dtype={self.settings.dtype}",
            f"training.global_batch_size={max(2, self.settings.processes)}",
            "training.eval_interval=0",
            "training.eval_batches=1",
            "parallel.activation_checkpointing=none",
            "parallel.zero_stage=1",
            "deepspeed.zero_optimization=null",
            "checkpoint.interval=0",
            "monitor.tensorboard=false",
            "monitor.sample_prompts=[]",
            "monitor.log_interval=1",
            *more,
        ]
        places = ["--output", self.work / name, "--config", self.run_file(name), "--like", "tiny.json"]
        arguments = [self.source, *places, "--data", self.work / data, *options, *overrides]
        if not self.steps.is_done(name):  # the command overwrites no run file, and may have been stopped after it
            self.run_file(name).unlink(missing_ok=True)
        self.steps.run(name, ["loop-from-dense", *arguments], threads=self.all_threads)

    def run_file(self, name: str) -> Path:
        """The run file of a looped model."""
        return self.work / f"{name}.json"

    def checked_source(self) -> dict[str, float]:
        """How far one loop is from the source."""
        kept = self.work / "source.json"
        if not kept.is_file():
            batch = held_out_sequences(load_config(str(self.run_file("looped"))).config, 2)[0]
            write_json(kept, source_difference(self.source, self.work / "looped", batch))
        return dict(json.loads(kept.read_text(encoding="utf-8")))

    def evaluate(self, name: str, model: Path, loops: tuple[int, ...], run_file: str = "looped") -> dict[str, Any]:
        """Losses of the held-out sequences of a run file, the same for all models."""
        file = self.work / f"{name}_losses.json"
        options = ["--config", self.run_file(run_file), "--sequences", self.settings.sequences, "--json", file]
        arguments = ["evaluate", model, *options, "--loops", *loops]
        self.steps.run(f"{name}_losses", arguments, threads=self.all_threads)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def train(
        self, name: str, start: str, overrides: list[str] | tuple[str, ...], run_file: str = "looped"
    ) -> dict[str, Any]:
        """Train from the model of a run file, merge, evaluate; the losses, and the seconds of training."""
        run, model = self.work / "runs" / name, self.work / name
        options = ["--config", self.run_file(start), "--processes", self.settings.processes, "--run-dir", run]
        seconds = self.steps.run(f"{name}_train", ["pretrain", *options, *overrides], threads=self.rank_threads)
        self.steps.run(f"{name}_merge", ["merge", run, "--output", model], threads=self.all_threads)
        loops = (1,) if overrides and overrides[0] == _CONTROL[0] else TRAINED_LOOPS
        return {**self.evaluate(name, model, loops, run_file), "train_seconds": seconds}

    def export_and_chat(self, name: str = "trained", prefix: str = "") -> list[dict[str, Any]]:
        """The answer to a question at 1 and 2 loops, from a trained model and from its export; prefix: of what is kept
        of it."""
        model, export, kept = self.work / name, self.work / f"{prefix}export", self.work / f"{prefix}chat.json"
        options = ["--from", "mythos", "--to", "hf", "--input", model, "--output", export, "--dtype", "float32"]
        self.steps.run(f"{prefix}export", ["convert", *options], threads=self.all_threads)
        for loops in (1, 2):
            settings = ["--loops", loops, "--tokens", _NEW_TOKENS, "--temperature", 0]
            arguments = ["generate", "--chat", QUESTION, "--model", model, *settings]
            self.steps.run(f"{prefix}generate_{loops}", arguments, threads=self.all_threads)
        if not kept.is_file():
            write_json(kept, [chat_tokens(model, export, loops, _NEW_TOKENS) for loops in (1, 2)])
        return list(json.loads(kept.read_text(encoding="utf-8")))
