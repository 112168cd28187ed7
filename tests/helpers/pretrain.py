"""Starts launch/pretrain.py in fresh processes, as a user or a scheduler would, with a very small model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_ds import ports
from tests.helpers.distributed import free_port
from tests.helpers.paths import ROOT
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

SCRIPT = ROOT / "launch" / "pretrain.py"

SMALL = (
    "model.dim=32",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.ffn_dim=64",
    "model.n_experts=4",
    "model.expert_dim=16",
    "model.max_loops=8",
    "training.seq_len=32",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    "training.warmup_steps=2",
    "training.eval_interval=0",
    "training.eval_batches=1",
    "checkpoint.interval=0",
    "monitor.log_interval=1",
    "monitor.tensorboard=false",
    "monitor.sample_prompts=[]",
    "monitor.sample_tokens=3",
)
"""Overrides of ds_configs/tiny.json."""


def small_data(folder: Path) -> list[str]:
    """Overrides that name a dataset of made-up words, which is made in `folder`."""
    tokenizer = make_tokenizer(folder)
    make_dataset(folder / "words", tokenizer, make_texts(300))
    return [
        f'data.datasets=[{{"prefix": "{folder / "words"}"}}]',
        f"data.tokenizer={tokenizer.path}",
        f"data.data_dir={folder}",
        f"model.vocab_size={tokenizer.vocab_size}",
    ]


@dataclass(frozen=True)
class Finished:
    """Exit codes by rank, and what each rank wrote to stdout and stderr."""

    codes: list[int]
    outputs: list[str]

    def check(self) -> "Finished":
        """Fail with the outputs unless every rank ended with 0."""
        assert set(self.codes) == {0}, f"exit codes {self.codes}\n" + "\n---\n".join(self.outputs)
        return self


class Pretrain:
    """The ranks of one started run of `program`. Ends them when left as a context manager."""

    def __init__(self, arguments: Sequence[str], *, nprocs: int, folder: Path, program: Sequence[str] = (str(SCRIPT),)):
        folder.mkdir(parents=True, exist_ok=True)
        # Held until rank 0 has it: nobody else takes the port meanwhile.
        listener = ports.listening(ports.ANY)
        port = ports.port_of(listener)
        self.logs = [folder / f"rank_{rank}.log" for rank in range(nprocs)]
        self.processes = []
        for rank, path in enumerate(self.logs):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nprocs, "LOCAL_WORLD_SIZE": nprocs}
            variables = {**environment(), **{name: str(value) for name, value in ranks.items()}}
            variables.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            held = () if rank else (listener.fileno(),)
            if rank == 0:
                variables[ports.HELD] = str(listener.fileno())
            with path.open("w") as log:
                command = [sys.executable, *program, *arguments]
                started = subprocess.Popen(
                    command, env=variables, stdout=log, stderr=subprocess.STDOUT, cwd=folder, pass_fds=held
                )
            self.processes.append(started)
        listener.close()

    def __enter__(self) -> "Pretrain":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def wait(self, timeout_s: float) -> Finished:
        """Wait for all ranks; past the time limit they are killed and the test fails with what they wrote."""
        deadline = time.monotonic() + timeout_s
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not finished after {timeout_s} s\n" + self.output()) from None
        return Finished(codes, [path.read_text() for path in self.logs])

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for `condition` while all ranks run."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = any(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(("a rank ended early\n" if ended else "waited in vain\n") + self.output())
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL every rank that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def output(self) -> str:
        """What all ranks wrote so far."""
        return "\n---\n".join(path.read_text() for path in self.logs)


def run_pretrain(arguments: Sequence[str], *, nprocs: int, folder: Path, timeout_s: float = 240) -> Finished:
    """Start a run and wait for its end."""
    with Pretrain(arguments, nprocs=nprocs, folder=folder) as run:
        return run.wait(timeout_s)


def run_under_deepspeed(arguments: Sequence[str], *, nprocs: int, folder: Path, timeout_s: float = 240):
    """`deepspeed --num_gpus nprocs launch/pretrain.py ...`; returns the completed process with its output as text."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(nprocs)]
    launcher += ["--master_port", str(free_port()), str(SCRIPT), *arguments]
    return subprocess.run(launcher, env=environment(), cwd=folder, capture_output=True, text=True, timeout=timeout_s)


def environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, on the CPU with one thread per process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    return {**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; [] before it exists. A line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
