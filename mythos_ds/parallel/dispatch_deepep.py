"""The dispatcher `deepep`: rows travel by DeepEP's kernels, through DeepSpeed's transport and its autograd functions.

A token goes once to each rank that holds any of its experts, and between nodes once to each node, as DeepEP does it;
with it go its routing weights. It arrives as a row for each of its experts there, by expert. Results are weighed here,
and DeepEP adds them up on the way back.

It has never run: DeepEP needs GPUs and NCCL of its own kind. What is tested is how DeepSpeed's transport is used.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
import torch.distributed as torch_distributed
from deepspeed.module_inject.auto_ep_comm import (
    DeepEPCheckpointReplay,
    DeepEPExchange,
    deepep_combine,
    deepep_dispatch,
    shared_exchange,
)
from torch import Tensor

from mythos_ds.errors import ParallelError
from mythos_ds.kernels.routing import count_experts
from mythos_ds.model.dispatch import Journey
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.routing_replay import RoutingDecision


@dataclass(frozen=True)
class _Route:
    """Gives a recompute the order in which the rows of its forward arrived: DeepEP's is another each time."""

    replay: DeepEPCheckpointReplay


class RowsByDeepEP:
    """Rows under way. The transport is synchronous: it waits where it sends."""

    def __init__(self, rows: Tensor, weights: Tensor, decision: RoutingDecision, exchange: DeepEPExchange):
        self.decision, self._exchange = decision, exchange
        arrived, self._weights, _ = deepep_dispatch(
            exchange, rows, decision.indices, weights, replay=decision.route.replay
        )
        self._handle = exchange.last_handle
        number = self._handle.num_expanded_tokens  # buffers may be longer
        self._rows, self._weights = arrived[:number], self._weights[:number]

    def hand_on(self) -> None:
        """Does nothing: DeepEP hands on inside nodes."""

    def compute(self, experts: Experts) -> None:
        """Computes this rank's experts, and weighs each row."""
        ends = self._handle.psum_num_recv_tokens_per_expert.long()
        results = experts(self._rows, ends.diff(prepend=ends.new_zeros(1)))
        self._rows = (results.float() * self._weights.reshape(-1, 1)).to(results.dtype)

    def send_back(self) -> None:
        """Lets DeepEP add up each token's rows."""
        self._rows = deepep_combine(self._exchange, self._rows, self._handle)

    def hand_back(self) -> None:
        """Does nothing: results come straight back."""

    def receive(self, shared: Tensor | None, stream: Tensor | None) -> Tensor:
        """Adds `shared`, and the sum to the residual `stream`, where given: [n, dim]."""
        out = self._rows if shared is None else self._rows + shared
        return out if stream is None else stream + out


class DeepEPDispatcher:
    """Sends tokens by a buffer that all layers and loops of a model share. Dropless."""

    returns_sums: ClassVar[bool] = True

    def __init__(self, group: torch_distributed.ProcessGroup, scope: int):
        """scope: the model's number, of DeepSpeed's `new_exchange_scope`."""
        self.group, self._scope = group, scope
        self.exchange: DeepEPExchange | None = None
        """The buffer, which DeepSpeed's engine frees."""

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        """Counts rows by expert: what goes where, DeepEP finds by itself."""
        return RoutingDecision(indices, count_experts(indices, n_experts), _Route(DeepEPCheckpointReplay()))

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        """Lets tokens leave. The first call makes the buffer, for as many tokens as it has: collective. Raises
        ParallelError for more tokens later."""
        if self.exchange is None:
            self.exchange = self._open(rows, weights.shape[1], len(decision.counts))
        if len(rows) > self.exchange.num_max_tokens_per_rank:
            raise ParallelError(
                f"{len(rows)} tokens in a micro-batch; allowed with parallel.dispatch deepep: at most "
                f"{self.exchange.num_max_tokens_per_rank}, which its buffer was made for by the first"
            )
        return RowsByDeepEP(rows, weights, decision, self.exchange)

    def _open(self, rows: Tensor, k: int, n_experts: int) -> DeepEPExchange:
        # DeepEP builds upon NCCL's communicator of the group, which is made by the group's first collective.
        torch_distributed.barrier(group=self.group, device_ids=[rows.device.index] if rows.is_cuda else None)
        return shared_exchange(self._scope, self.group, n_experts, k, rows.shape[1], len(rows))


def require_deepep(device: torch.device) -> None:
    """Raises ParallelError where DeepEP cannot run."""
    if device.type == "cuda" and find_spec("deep_ep") is not None:
        return
    why = f"on {device.type}" if device.type != "cuda" else "where the package deep_ep is not installed"
    raise ParallelError(
        f'parallel.dispatch: given "deepep" {why}; allowed: on CUDA with deep_ep (and NCCL 2.30.4 or newer); '
        'nearest: "per_rank"',
        code="MDS281",
    )
