"""Train with a callback: something of one's own that is called at fixed points of every step.

It is called on every rank alike; under a launcher the same script is one process of many. Making the corpus takes
processes that read this file again: what trains stands below `if __name__ == "__main__"`.
"""

import mythos_ds

ONE_PROCESS = ["parallel.ep_size=1", "parallel.zero_stage=0", "deepspeed.zero_optimization=null"]
SHORT = ["training.max_steps=3", "training.warmup_steps=1", "training.eval_batches=1", "monitor.sample_tokens=4"]


class Spikes(mythos_ds.Callback):
    """Remembers the steps whose loss is above that of the step before."""

    def __init__(self):
        self.losses = []

    def after_step(self, state):
        self.losses.append(state.loss)

    def on_end(self, state, summary):
        if state.rank == 0:
            pairs = zip(self.losses, self.losses[1:], strict=False)
            rises = [step for step, (before, after) in enumerate(pairs, 2) if after > before]
            print(f"{state.step} steps; the loss rose at {rises or 'none of them'}")


if __name__ == "__main__":
    mythos_ds.pretrain("tiny", run_dir="callback-run", overrides=[*ONE_PROCESS, *SHORT], callbacks=[Spikes()])
