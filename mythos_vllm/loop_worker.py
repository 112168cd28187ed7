"""Loops per request on vLLM's first model runner (V1): a worker that tells the model how often each row runs.

vLLM chooses it by itself for a looped model (see loop_admission.py).
"""

import functools
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from .request_loops import admitted_loops
from .row_loops import count_rows

_OF_PLATFORM = "cpu_worker.CPUWorker" if current_platform.is_cpu() else "gpu_worker.Worker"
_Worker: Any = resolve_obj_by_qualname(f"vllm.v1.worker.{_OF_PLATFORM}")


class LoopWorker(_Worker):
    """vLLM's worker of this platform, whose runner hands each row's loops to the model."""

    def init_device(self) -> None:
        """Make the runner, as vLLM does. Its second runner asks the model instead (see loop_state.py)."""
        super().init_device()
        if not self.use_v2_model_runner:
            hand_on_loops(self.model_runner)


def hand_on_loops(runner: Any) -> None:
    """Add `loop_counts` to what a first runner gives the model's forward, where a request of the batch asks for other
    loops than the server's."""
    prepare, served = runner._preprocess, runner.model_config.hf_config.n_loops

    @functools.wraps(prepare)
    def preprocess(scheduled: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        *before, arguments, after = prepare(scheduled, *args, **kwargs)
        names = runner.input_batch.req_ids  # in the order of the rows
        loops = [admitted_loops(runner.requests[name].sampling_params, served) for name in names]
        counts = count_rows(loops, [scheduled.num_scheduled_tokens[name] for name in names], served)
        return *before, arguments if counts is None else {**arguments, "loop_counts": counts}, after

    runner._preprocess = preprocess
