"""The training loop: steps, metrics, evaluation, samples, checkpoints and a clean stop."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mythos_ds.checkpoint.save import CheckpointWriter, TrainingState, layout_of
from mythos_ds.config.depth_distribution import evaluation_depths
from mythos_ds.config.layout import RankLayout
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.pipeline import predict
from mythos_ds.data.batches import Batch
from mythos_ds.engine.training_engine import StepResult, TrainingEngine
from mythos_ds.errors import NumericsError
from mythos_ds.inference.generate import generate
from mythos_ds.log import get_logger
from mythos_ds.monitor.memory import peak_memory_bytes
from mythos_ds.monitor.throughput import Throughput, peak_flops
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.resilience.signals import StopSignals
from mythos_ds.train.callbacks import Callback, CallbackList, CallbackState
from mythos_ds.train.data_loader import DataLoader
from mythos_ds.train.depth_sampler import DepthSampler
from mythos_ds.train.evaluation import losses_at
from mythos_ds.train.lr_schedule import learning_rate
from mythos_ds.train.metrics_logger import MetricsLogger
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import RunManifest
from mythos_ds.train.summary import RunSummary

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: completed optimizer steps, and the validation loss before its training stage's first one."""

    step: int = 0
    first_loss: float | None = None


class Trainer:
    """Trains an engine from `progress` to the end of the manifest's training stage, or until a stop is asked for.

    `callbacks.py` says when the callbacks are called.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        groups: ParallelGroups,
        engine: TrainingEngine,
        data: DataLoader,
        run: RunDirectory,
        manifest: RunManifest,
        progress: Progress,
        callbacks: Sequence[Callback] = (),
    ):
        config = resolved.config
        self.resolved, self.config, self.groups, self.engine = resolved, config, groups, engine
        self.data, self.run, self.manifest = data, run, manifest
        self.step, self.first_loss = progress.step, progress.first_loss
        self.sampler = DepthSampler.of(config, manifest.start)
        peak = peak_flops(groups.device, _DTYPES[config.training.dtype])
        self.throughput = Throughput(resolved, peak)
        self.saved_step = progress.step if progress.step else -1
        self.writer = CheckpointWriter(engine, groups, run.checkpoints, config.checkpoint, self._saved)
        self.callbacks = CallbackList(callbacks)
        self.state = CallbackState(engine, data, run.root, manifest.total_steps, self.step)

    def train(self, stop: StopSignals) -> RunSummary:
        """Run to the end. Raises NumericsError, with the step, when a loss or gradient norm is not finite."""
        summary = self._train(stop)
        self.callbacks.on_end(self.state, summary)
        return summary

    def _train(self, stop: StopSignals) -> RunSummary:
        total = self.manifest.total_steps
        mean = self.config.model.mean_recurrence
        with MetricsLogger(self.run, self.config.monitor, self.groups.rank == 0, self.step, total) as metrics:
            if self.first_loss is None:
                self.first_loss = self._evaluate(metrics, [mean], first=self.manifest.start_step > 0).get(mean)
            for batches in self.data.steps(self.step):
                if self._stop_asked(stop):
                    break
                self._train_step(batches, metrics)
                self._after_step(metrics, total)
                metrics.checkpoint(self.step, self.writer.advance())
            self._save()
            self.writer.finish()
            metrics.checkpoint(self.step, self.writer.advance())
            if self.step < total:
                return RunSummary(self.step, False, self.first_loss, {}, [])
            losses = self._evaluate(metrics, evaluation_depths(mean, deep=True))
            samples = self._samples()
            metrics.samples(self.step, samples)
        return RunSummary(self.step, True, self.first_loss, losses, samples)

    def _stop_asked(self, stop: StopSignals) -> bool:
        """Whether any rank was asked to stop: all leave the loop after the same step."""
        return self.groups.any(stop.requested)

    def _train_step(self, batches: list[Batch], metrics: MetricsLogger) -> None:
        started = time.perf_counter()
        depths = self.sampler.depths_at(self.step)
        n_loops = max(depths) if depths else self.sampler.loops_at(self.step)
        if depths:
            batches = with_depths(batches, depths, self.groups.layout)
        own_step = self.step - self.manifest.start_step
        lr = learning_rate(own_step, self.config.training, self.manifest.lengths, self.manifest.start_lr)
        logged = self._is_logged(self.step + 1)
        self.state = replace(self.state, n_loops=n_loops, lr=lr, loss=None, grad_norm=None)
        self.callbacks.before_step(self.state)
        try:
            result = self.engine.train_step(
                batches,
                n_loops=n_loops,
                n_grad_loops=self.resolved.mean_backprop_depth,
                lr=lr,
                statistics=logged,
                after_backward=self._after_backward,
            )
        except NumericsError as error:
            self.writer.finish()
            self.state = replace(self.state, loss=error.loss, grad_norm=error.grad_norm)
            self.callbacks.on_anomaly(self.state)
            advice = "earlier checkpoints are intact: resume with a lower training.lr or a longer warm-up"
            raise NumericsError(f"step {self.step + 1}: {error}\n{advice}", code=error.code) from error
        self.step += 1
        self.state = replace(self.state, step=self.step, grad_norm=result.grad_norm)
        self.throughput.add(n_loops, time.perf_counter() - started, self.manifest.batches.at(own_step))
        metrics.progress(self.step, result.loss, n_loops)
        if logged:
            metrics.step(
                self.step,
                {
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "lr": lr,
                    "n_loops": n_loops,
                    "tokens": self.manifest.tokens_at(self.step),
                    **({"mean_depth": sum(depths) / len(depths)} if depths else {}),
                    **self.throughput.read(),
                    "peak_memory_bytes": peak_memory_bytes(),
                    **result.routing,
                    **self._pipeline_metrics(result, n_loops),
                },
            )
        self.callbacks.after_step(self.state)

    def _after_backward(self, loss: float) -> None:
        self.state = replace(self.state, loss=loss)
        self.callbacks.after_backward(self.state)

    def _saved(self, checkpoint: Path) -> None:
        self.callbacks.on_save(self.state, checkpoint)

    def _pipeline_metrics(self, result: StepResult, n_loops: int) -> dict[str, float]:
        """Idle time, and (virtual stage, micro-batch) pairs held for their backward, as measured and as simulated."""
        if not result.pipeline:
            return {}
        predicted = predict(self.resolved, n_loops)
        return {
            **result.pipeline,
            "pipeline/predicted_idle_share": predicted.bubble,
            "pipeline/predicted_peak_held_visits": max(predicted.peak_held),
        }

    def _is_logged(self, step: int) -> bool:
        return step % self.config.monitor.log_interval == 0 or step in (
            self.manifest.start_step + 1,
            self.manifest.total_steps,
        )

    def _after_step(self, metrics: MetricsLogger, total: int) -> None:
        """Periodic evaluation and checkpoint; the end of the run has its own."""
        if self.step == total:
            return
        interval = self.config.checkpoint.interval
        if interval and self.step % interval == 0:
            self._save()
        interval = self.config.training.eval_interval
        if interval and self.step % interval == 0:
            deep = self.step // interval % self.config.training.eval_deep_every == 0
            self._evaluate(metrics, evaluation_depths(self.config.model.mean_recurrence, deep=deep))
            metrics.samples(self.step, self._samples())

    def _evaluate(self, metrics: MetricsLogger, loop_counts: list[int], *, first: bool = False) -> dict[int, float]:
        losses = losses_at(self.engine, self.data.validation, loop_counts)
        metrics.evaluation(self.step, losses, first=first)
        return losses

    def _samples(self) -> list[tuple[str, str]]:
        """Prompts and their continuations as text, the same on all ranks; none where the data is not text."""
        tokenizer, monitor = self.data.tokenizer, self.config.monitor
        if tokenizer is None:
            return []
        prompts = [tokenizer.encode(text) for text in monitor.sample_prompts] or [self.data.held_out_prompt()]
        prompts = [prompt for prompt in prompts if prompt]  # without validation there is none
        samples = []
        for index, prompt in enumerate(prompts):
            continuation = generate(
                self._next_logits,
                prompt,
                new_tokens=monitor.sample_tokens,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                context_length=self.config.training.seq_len,
                seed=self.config.training.seed + index,
                broadcast=self._broadcast,
            )
            samples.append((tokenizer.decode(prompt), tokenizer.decode(continuation)))
        return samples

    def _next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.engine.logits(tokens, self.config.model.mean_recurrence)[0, -1]

    def _broadcast(self, token: int) -> int:
        """Rank 0's token: each rank's sums may round differently."""
        return round(self.groups.sum([float(token if self.groups.rank == 0 else 0)])[0])

    def _save(self) -> None:
        if self.step == self.saved_step or self.step == 0:
            return
        state = TrainingState(
            step=self.step,
            consumed_samples=self.manifest.samples_at(self.step),
            first_validation_loss=self.first_loss,
            layout=layout_of(self.resolved),
            config=self.config.model_dump(mode="json"),
            init_from=self.manifest.starting_weights,
            run=self.manifest.as_dict(),
            consumed_tokens=self.manifest.tokens_at(self.step) if self.manifest.former_stages else None,
        )
        self.writer.save(state)
        self.saved_step = self.step


def with_depths(batches: list[Batch], depths: tuple[int, ...], layout: RankLayout) -> list[Batch]:
    """This rank's micro-batches with the loop counts of their rows, from those of the global batch in sample order."""
    by_micro_batch = torch.tensor(depths).view(len(batches), -1)
    rows = list(layout.rows_of(by_micro_batch.shape[1]))
    return [{**batch, "depths": by_micro_batch[index, rows]} for index, batch in enumerate(batches)]
