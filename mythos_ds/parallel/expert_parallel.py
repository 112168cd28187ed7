"""Expert parallelism: experts are born sharded, and rows travel to them.

A rank only ever allocates its own n_experts / ep_size experts. The marks on their parameters are those of DeepSpeed's
AutoEP contract: ZeRO then cuts them over the ranks that hold the same experts, averages their gradients over all data
and counts each once in the gradient norm. DeepSpeed's own router and forward are not used: they know no loops.
"""

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
from deepspeed.module_inject.auto_ep_comm import DeepEPExchange
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn

from mythos_ds.config.layout import RankLayout
from mythos_ds.config.schema import ModelConfig
from mythos_ds.errors import ParallelError
from mythos_ds.model.dispatch import Dispatcher
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.moe import MoE
from mythos_ds.parallel.dispatch_all_to_all import AllToAllDispatcher
from mythos_ds.parallel.dispatch_deepep import DeepEPDispatcher
from mythos_ds.parallel.dispatch_per_node import PerNodeDispatcher
from mythos_ds.parallel.dispatch_per_rank import PerRankDispatcher
from mythos_ds.parallel.groups import (
    ParallelGroups,
    expert_group_name,
    require_expert_data_group,
    require_expert_group,
)


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
        self._layout, self._groups = layout, groups
        self.ep_size, self.ep_rank = layout.ep_size, layout.ep_rank
        self.ep_group_name = expert_group_name(layout.ep_size)
        self.ep_group = require_expert_group(layout.ep_size)
        super().__init__(config, init, layer=layer)
        self.num_experts = config.n_experts
        self.num_local_experts = len(layout.expert_range(config.n_experts))
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, layout.ep_size
        )

    @property
    def _deepep_exchange(self) -> DeepEPExchange | None:
        """The transport's buffer, which DeepSpeed's engine asks each layer for when it ends, to free it."""
        return self.dispatcher.exchange if isinstance(self.dispatcher, DeepEPDispatcher) else None

    @_deepep_exchange.setter
    def _deepep_exchange(self, exchange: DeepEPExchange | None) -> None:
        if isinstance(self.dispatcher, DeepEPDispatcher):
            self.dispatcher.exchange = exchange

    def make_experts(self, config: ModelConfig, init: Initializer) -> Experts:
        """Only this rank's experts."""
        return ShardedExperts(config, init, self._layout)

    def make_dispatcher(self) -> Dispatcher:
        """The one that the run has chosen, over the expert-parallel group."""
        if self._groups.dispatch.name == "deepep":
            return DeepEPDispatcher(self.ep_group, self._groups.exchange_scope)
        in_fp8 = self._groups.rows_in_fp8
        if self._groups.node_groups is not None:
            return PerNodeDispatcher(self._groups.node_groups, in_fp8=in_fp8)
        kind = PerRankDispatcher if self._groups.dispatch.name == "per_rank" else AllToAllDispatcher
        return kind(self.ep_group, in_fp8=in_fp8)
