"""A double of the package deep_ep: its buffer by the collectives of torch, noting what it is asked.

Rows arrive by expert, and those of one expert in another order at each dispatch, as over DeepEP's network; buffers are
longer than what arrived; a handle repeats the order it was made in.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor

SPARE = 3
"""Rows of a buffer beyond those that arrived."""


@dataclass
class Handle:
    """What a dispatch leaves for its combine, and for both backward passes."""

    topk_idx: Tensor
    do_expand: bool
    num_expanded_tokens: int
    psum_num_recv_tokens_per_expert: Tensor
    origin: list[tuple[int, int, int]]
    """Of each row that arrived: rank, token, place among the token's choices."""


class ElasticBuffer:
    """Takes the keywords that DeepSpeed gives DeepEP's, and no others."""

    def __init__(
        self,
        group: torch_distributed.ProcessGroup,
        *,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int,
        use_fp8_dispatch: bool,
        num_allocated_qps: int,
        allow_hybrid_mode: bool,
        explicitly_destroy: bool,
    ):
        self.group, self.capacity = group, num_max_tokens_per_rank
        self.calls: list[dict[str, Any]] = []
        self.destroyed = False
        self._generator = torch.Generator().manual_seed(0)
        assert allow_hybrid_mode
        assert explicitly_destroy
        assert not use_fp8_dispatch
        MADE.append(self)

    def dispatch(
        self,
        x: Tensor,
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        do_expand: bool = False,
        expert_alignment: int | None = None,
        num_sms: int,
        handle: Handle | None = None,
    ) -> tuple[Tensor, None, Tensor | None, Handle, None]:
        """New where it is given choices, else as the handle was."""
        assert do_expand, "rows are wanted by expert"
        kind = "dispatch" if handle is None else "dispatch again"
        self.calls.append({"call": kind, "rows": tuple(x.shape), "weights": topk_weights is not None})
        if handle is None:
            assert topk_idx is not None
            assert num_experts is not None
            assert expert_alignment == 1
            assert len(x) <= self.capacity
            handle = self._placed(topk_idx, num_experts)
        rows, weights = self._everyone(x), self._everyone(topk_weights)
        arrived = [rows[rank][token] for rank, token, _ in handle.origin]
        spare = [torch.full_like(x[0], torch.nan) if len(x) else x.new_full((x.shape[1],), torch.nan)] * SPARE
        received = torch.stack([*arrived, *spare])
        if topk_weights is None:
            return received, None, None, handle, None
        own = [weights[rank][token, place] for rank, token, place in handle.origin]
        return received, None, torch.stack([*own, *[topk_weights.new_tensor(torch.nan)] * SPARE]), handle, None

    def combine(
        self, x: Tensor, *, handle: Handle, topk_weights: Tensor | None = None, num_sms: int
    ) -> tuple[Tensor, Tensor | None, None]:
        """Adds up what came of each token; weights go back to their places."""
        self.calls.append({"call": "combine", "rows": tuple(x.shape), "weights": topk_weights is not None})
        number = handle.num_expanded_tokens
        rows, weights = self._everyone(x[:number]), self._everyone(topk_weights)
        origins: list[Any] = self._everyone(handle.origin)
        rank, tokens = torch_distributed.get_rank(self.group), len(handle.topk_idx)
        out = x.new_zeros(tokens, x.shape[1])
        own = None if topk_weights is None else topk_weights.new_zeros(handle.topk_idx.shape)
        for other, origin in enumerate(origins):
            for row, (source, token, place) in enumerate(origin):
                if source == rank:
                    out[token] += rows[other][row]
                    if own is not None:
                        own[token, place] += weights[other].flatten()[row]
        return out, own, None

    def destroy(self) -> None:
        """Notes it."""
        self.destroyed = True

    def _placed(self, topk_idx: Tensor, num_experts: int) -> Handle:
        ranks = torch_distributed.get_world_size(self.group)
        local = num_experts // ranks
        first = torch_distributed.get_rank(self.group) * local
        origin: list[tuple[int, int, int]] = []
        ends = []
        choices = self._everyone(topk_idx)
        for expert in range(first, first + local):
            found = [(rank, *pair) for rank in range(ranks) for pair in (choices[rank] == expert).nonzero().tolist()]
            origin += [found[index] for index in torch.randperm(len(found), generator=self._generator).tolist()]
            ends.append(len(origin))
        return Handle(topk_idx, True, len(origin), torch.tensor(ends, dtype=torch.int32), origin)

    def _everyone(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * torch_distributed.get_world_size(self.group)
        torch_distributed.all_gather_object(found, value, group=self.group)
        return found


MADE: list[ElasticBuffer] = []
"""All buffers of this process."""


def deep_ep() -> ModuleType:
    """Makes the package."""
    made: Any = ModuleType("deep_ep")
    made.ElasticBuffer, made.topk_idx_t = ElasticBuffer, torch.int64
    return made
