"""Make the released tiny model: train tiny.json longer, on one process, and write its folder with a model card.

mythos-ds train-tiny --output models/tiny --steps 2000
mythos-ds train-tiny --output /tmp/try --steps 20 training.eval_batches=1
"""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, resolve
from mythos_ds.data.tokenizer_files import copy_tokenizer
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ConfigError
from mythos_ds.io import write_atomic
from mythos_ds.mains import run_tool
from mythos_ds.monitor.throughput import gpu_name
from mythos_ds.provenance import describe, git_commit
from mythos_ds.train.callbacks import Callback, CallbackState
from mythos_ds.train.evaluation import perplexity
from mythos_ds.train.run import RunRequest, train
from mythos_ds.train.summary import RunSummary
from mythos_ds.weights.model_folder import TOKENIZER, save_model
from mythos_ds.weights.reader import SINGLE

_ONE_PROCESS = (
    "parallel.ep_size=1",
    "parallel.zero_stage=0",
    "training.micro_batch_size=8",
    "deepspeed.zero_optimization=null",  # tiny.json's are settings of ZeRO-3
)


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=Path("models/tiny"))
    made.add_argument("--run-dir", type=Path, default=Path("runs/release-tiny"))
    made.add_argument("--steps", type=int, default=2000)
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    return made


def work(arguments: Namespace) -> None:
    environment = ProcessEnvironment.detect(os.environ)
    if environment.world_size != 1:
        raise ConfigError(f"processes: given {environment.world_size}; allowed: 1 (run it with python)")
    overrides = [*_ONE_PROCESS, f"training.max_steps={arguments.steps}", *arguments.overrides]
    loaded = load_config("tiny", overrides)
    resolved = resolve(loaded.config, 1)

    request = RunRequest((ResolvedStage(None, resolved),), loaded.text, arguments.run_dir, "auto", tuple(sys.argv[1:]))
    train(request, environment, callbacks=[Release(arguments)])


class Release(Callback):
    """Writes the model's folder when training is complete."""

    def __init__(self, arguments: Namespace):
        self.arguments = arguments

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        if not summary.finished or state.data.tokenizer is None:
            return
        metadata: dict[str, Any] = {
            "losses": summary.losses,
            "tokens": state.engine.resolved.tokens_per_step * summary.step,
            "seq_len": state.config.training.seq_len,
            "training": state.config.training.model_dump(mode="json"),
            "data": state.data.identity,
        }
        output = self.arguments.output
        save_model(state.model, output, metadata)
        copy_tokenizer(state.data.tokenizer.path, output)
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        write_atomic(output / "README.md", card(metadata, summary, parameters, self.arguments))


def card(metadata: dict[str, Any], summary: RunSummary, parameters: int, arguments: Namespace) -> str:
    """The model card: what it is, how it was made, what it scores, what it says."""
    command = " ".join(["mythos-ds train-tiny --steps", str(arguments.steps), *arguments.overrides])
    rows = [f"| {loops} | {loss:.4f} | {perplexity(loss):.1f} |" for loops, loss in summary.losses.items()]
    samples = "\n".join(f"{json.dumps(prompt)} -> {json.dumps(text)}" for prompt, text in summary.samples)
    return f"""# tiny: a recurrent-depth mixture of experts of {parameters / 1e6:.1f}M parameters

A toy that shows the architecture at work: it writes what looks like Python and its documentation, and knows nothing.
Try it: `mythos-ds generate "def main("`.

* Trained on {metadata["tokens"] / 1e6:.1f}M tokens ({summary.step} steps) of the text of a Python installation (source
  code and English documentation, PSF licence), {time.strftime("%Y-%m-%d", time.gmtime())}.
* Hardware: {describe(gpu_name())}.
* Made by `{command}`, commit {git_commit() or "unknown"}.
* {SINGLE}: fp32 weights; {TOKENIZER}: sentencepiece, 4096 pieces. Another Python installation has other text, and
  losses then differ by some percent.
* Trained at random depth with mean 4; context {metadata["seq_len"]} tokens. One seed. Evaluated for loss alone:

| loops | held-out loss (nats per token) | perplexity |
| ---: | ---: | ---: |
{chr(10).join(rows)}

Samples at 4 loops, temperature 0.8:

```
{samples}
```
"""


if __name__ == "__main__":
    code = run_tool(parser(), work, None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a process group now and then abort the interpreter's own way out
