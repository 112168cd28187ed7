"""launch/pretrain.py with a rank that fails: `python tests/helpers/failing_pretrain.py RANK STEP HOW ARGUMENTS...`.

HOW is "raise" (an exception in the middle of a step's schedule) or "hang" (the rank goes no further).
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

# Started as a file, away from the checkout: neither tests nor, by that name, launch can be imported here.
main = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "pretrain.py"))["main"]


def fail_in_step(step: int, how: str) -> None:
    """Makes the calling process fail in the second forward of step `step`, counted from 1."""
    from mythos_ds.engine.training_engine import TrainingEngine
    from mythos_ds.model.pipeline_stage import StageModel

    train_step, forward = TrainingEngine.train_step, StageModel.forward
    calls = {"step": 0, "forward": 0}

    def counted_step(self: TrainingEngine, *args: Any, **kwargs: Any) -> Any:
        calls.update(step=calls["step"] + 1, forward=0)
        return train_step(self, *args, **kwargs)

    def counted_forward(self: StageModel, *args: Any, **kwargs: Any) -> Any:
        calls["forward"] += 1
        if calls["step"] == step and calls["forward"] == 2:
            if how == "raise":
                raise RuntimeError("this rank was told to fail")
            time.sleep(3600)
        return forward(self, *args, **kwargs)

    TrainingEngine.train_step = counted_step  # type: ignore[method-assign]
    StageModel.forward = counted_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, at_step, manner, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        fail_in_step(int(at_step), manner)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)
