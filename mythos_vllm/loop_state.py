"""Loops per request on vLLM's second model runner (V2), by its hook for models that keep a state of their own.

Never run on a GPU, where alone that runner works: its interface is tested on a CPU.
"""

from typing import Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .request_loops import admitted_loops, experimental_option
from .row_loops import count_rows


class LoopState(DefaultModelState):
    """The loops of the requests that the runner holds, by its index of each."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.served: int = self.model_config.hf_config.n_loops
        self.loops = np.full(self.max_num_reqs, self.served)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note a request's loops; vLLM calls this again when it resumes one."""
        super().add_request(req_index, new_req_data)
        self.loops[req_index] = admitted_loops(new_req_data.sampling_params, self.served)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """The keywords of the model's forward: `loop_counts` where a request of the batch asks for other loops than
        the server's."""
        inputs = super().prepare_inputs(input_batch, req_states)
        count = input_batch.num_reqs
        tokens = np.diff(input_batch.query_start_loc_np[: count + 1])
        counts = count_rows(self.loops[input_batch.idx_mapping_np[:count]].tolist(), tokens.tolist(), self.served)
        return inputs if counts is None else {**inputs, "loop_counts": counts}


def state_class(vllm_config: Any) -> type[DefaultModelState]:
    """The state that the second runner keeps: LoopState where the experimental option is set, else vLLM's own."""
    return LoopState if experimental_option(vllm_config.additional_config, True) else DefaultModelState
