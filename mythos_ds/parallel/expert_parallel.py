"""Expert parallelism: experts are born sharded, and rows travel to them by all-to-all.

A rank only ever allocates its own n_experts / ep_size experts. The marks on their parameters are those of DeepSpeed's
AutoEP contract: ZeRO then cuts them over the ranks that hold the same experts, averages their gradients over all data
and counts each once in the gradient norm. DeepSpeed's own router and forward are not used: they know no loops.
"""

from dataclasses import dataclass

import torch
import torch.distributed as torch_distributed
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mythos_ds.config.layout import RankLayout
from mythos_ds.config.schema import ModelConfig
from mythos_ds.errors import ParallelError
from mythos_ds.kernels.permute import inverse_permutation, permute_rows
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.moe import Dispatcher, MoE
from mythos_ds.parallel.groups import (
    ParallelGroups,
    expert_group_name,
    require_expert_data_group,
    require_expert_group,
)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, send: list[int], receive: list[int], group: torch_distributed.ProcessGroup
    ) -> Tensor:
        ctx.splits, ctx.group = (send, receive), group
        return exchange_rows(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        send, receive = ctx.splits
        return exchange_rows(grad, receive, send, ctx.group), None, None, None


def exchange_rows(rows: Tensor, send: list[int], receive: list[int], group: torch_distributed.ProcessGroup) -> Tensor:
    """rows [sum(send), dim] -> [sum(receive), dim]: the next send[r] rows go to rank r of the group. No gradient."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    torch_distributed.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


@dataclass(frozen=True)
class _Route:
    """Where the rows of one call go, agreed with the other ranks of the group."""

    send: list[int]
    receive: list[int]
    """Rows to and from each rank."""
    order: Tensor
    back: Tensor
    """int64 [arriving rows]: the order by own expert, and its inverse."""
    counts: Tensor
    """int64 [local experts]: arriving rows of each."""


class ExpertParallelDispatcher:
    """Brings rows to the ranks of their experts and back. Dropless: every row arrives, however uneven the load.

    A call without a route exchanges counts and waits for them on the host, as row exchanges take their sizes from
    there; one with a route does neither.
    """

    def __init__(self, group: torch_distributed.ProcessGroup):
        self.group = group
        self.size = torch_distributed.get_world_size(group)

    def __call__(
        self, experts: Experts, rows: Tensor, counts: Tensor, route: _Route | None = None
    ) -> tuple[Tensor, _Route]:
        """rows [n, dim] sorted by global expert, counts int64 [n_experts] -> results [n, dim] in the same order, and
        the route, which a recompute of the same call gives again."""
        route = self._agree(counts) if route is None else route
        arrived = _AllToAll.apply(rows, route.send, route.receive, self.group)
        results = experts(permute_rows(arrived, route.order, route.back), route.counts)
        results = permute_rows(results, route.back, route.order)
        return _AllToAll.apply(results, route.receive, route.send, self.group), route

    def _agree(self, counts: Tensor) -> _Route:
        outgoing = counts.view(self.size, -1)
        incoming = torch.empty_like(outgoing)
        torch_distributed.all_to_all_single(incoming, outgoing, group=self.group)
        send, receive = torch.stack([outgoing.sum(1), incoming.sum(1)]).tolist()
        order, back = _sort_by_expert(incoming, sum(receive))
        return _Route(send, receive, order, back, incoming.sum(0))


def _sort_by_expert(incoming: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Row order by (expert, source rank) for rows that arrive by (source rank, expert), and its inverse.

    incoming: int64 [ranks, local experts], rows per source rank and expert.
    """
    expert_of_run = torch.arange(incoming.shape[1], device=incoming.device).repeat(incoming.shape[0])
    order = expert_of_run.repeat_interleave(incoming.flatten(), output_size=rows).argsort(stable=True)
    return order, inverse_permutation(order)


class ShardedExperts(Experts):
    """The calling rank's experts of one layer, drawn by global expert id and marked for DeepSpeed.

    The marks are set inside `__init__`: under `zero.Init` the parameters are cut up the moment it returns.
    """

    def __init__(self, config: ModelConfig, init: Initializer, layout: RankLayout):
        own = layout.expert_range(config.n_experts)
        std, out_std = config.resolved_init_std, config.resolved_output_std
        super().__init__(len(own), config.dim, config.expert_dim, init, std, first_expert=own.start, out_std=out_std)
        placement = legacy_uniform_autoep_placement_descriptor(config.n_experts, len(own), layout.ep_size)
        for parameter in (self.w1, self.w2, self.w3):
            _mark_expert_parameter(parameter, layout.ep_size)
            _mark_checkpoint_placement(parameter, placement, config.n_experts, layout.ep_rank)


def _mark_expert_parameter(parameter: nn.Parameter, ep_size: int) -> None:
    name = expert_group_name(ep_size)
    marks = {
        "allreduce": False,
        "group_name": name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": name,
        "ds_zero_partition_process_group": require_expert_data_group(ep_size),
    }
    for key, value in marks.items():
        setattr(parameter, key, value)


def _mark_checkpoint_placement(parameter: nn.Parameter, placement: dict, n_experts: int, ep_rank: int) -> None:
    """DeepSpeed refuses to save an expert parameter that does not say which experts it holds."""
    shape = [n_experts, *parameter.shape[1:]]
    metadata = {
        AUTOEP_EXPERT_PLACEMENT: placement,
        AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
        AUTOEP_PARAM_LOGICAL_SHAPE: shape,
        AUTOEP_PARAM_EP_RANK: ep_rank,
        AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, ep_rank)),
    }
    setattr(parameter, DS_AUTOEP_UC_META, metadata)


class ExpertParallelMoE(MoE, AutoEPMoELayer):
    """The MoE layer with n_experts / ep_size experts on this rank; same forward and parameter names.

    It is a `deepspeed` AutoEPMoELayer by type only, so that the engine recognises it. Errors: ParallelError where the
    experts cannot be shared out evenly or the groups do not exist.
    """

    def __init__(self, config: ModelConfig, init: Initializer, *, groups: ParallelGroups, layer: int = 0):
        layout = groups.layout
        if config.n_experts % layout.ep_size:
            raise ParallelError(
                f"parallel.ep_size: given {layout.ep_size}; allowed: a divisor of model.n_experts = {config.n_experts}."
            )
        # Read by make_experts and make_dispatcher; the rest is what DeepSpeed's engine and checkpoints ask a layer for.
        self._layout = layout
        self.ep_size, self.ep_rank = layout.ep_size, layout.ep_rank
        self.ep_group_name = expert_group_name(layout.ep_size)
        self.ep_group = require_expert_group(layout.ep_size)
        super().__init__(config, init, layer=layer)
        self.num_experts = config.n_experts
        self.num_local_experts = len(layout.expert_range(config.n_experts))
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, layout.ep_size
        )

    def make_experts(self, config: ModelConfig, init: Initializer) -> Experts:
        """Only this rank's experts."""
        return ShardedExperts(config, init, self._layout)

    def make_dispatcher(self) -> Dispatcher:
        """All-to-all over the expert-parallel group."""
        return ExpertParallelDispatcher(self.ep_group)
