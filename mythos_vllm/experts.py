"""Feed-forwards on vLLM's matrices: dense, and routed experts with the model's own router."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from mythos_hf.configuration_mythos import MythosConfig
from mythos_hf.experts_mythos import MythosRouter
from mythos_vllm.checks import shared_width


class FeedForward(nn.Module):
    """SwiGLU, its hidden units divided among ranks. reduce: whether their parts are summed here."""

    def __init__(self, vllm_config: VllmConfig, dim: int, hidden: int, prefix: str, reduce: bool = True):
        super().__init__()
        options: dict[str, Any] = {"bias": False, "quant_config": vllm_config.quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(dim, [hidden] * 2, prefix=f"{prefix}.gate_up_proj", **options)
        options |= {"prefix": f"{prefix}.down_proj", "reduce_results": reduce}
        self.down_proj = RowParallelLinear(hidden, dim, **options)
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, dim] -> the same."""
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class LoopedExperts(nn.Module):
    """Router, routed and shared experts; one sum over ranks for both.

    The router's biases differ by loop, which vLLM's own cannot express: it decides here, on each rank alike, and its
    weights and choices travel to the fused experts in the columns where logits would be.
    """

    def __init__(self, config: MythosConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.columns, self.k = config.n_routed_experts, config.num_experts_per_tok
        self.router = MythosRouter(config)
        self.shared_experts = None
        if config.n_shared_experts:
            name = f"{prefix}.shared_experts"
            self.shared_experts = FeedForward(vllm_config, config.hidden_size, shared_width(config), name, reduce=False)
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=self.k,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=False,
            custom_routing_function=self.routed,
            router_logits_dtype=torch.float32,
            quant_config=vllm_config.quant_config,
            shared_experts=self.shared_experts,
            prefix=f"{prefix}.experts",
        )

    def routed(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """What the router decided, unpacked from where vLLM expects logits: weights and experts, both [tokens, k]."""
        weights = gating_output[:, :topk].contiguous()
        chosen = gating_output[:, topk : 2 * topk].to(torch.int32)
        own = self.experts.routed_experts.expert_map
        return local(weights, chosen, own) if own is not None and current_platform.is_cpu() else (weights, chosen)

    def forward(self, x: Tensor, loop: int) -> Tensor:
        """x [tokens, dim] -> the same."""
        indices, weights = self.router(x, loop)
        packed = weights.new_zeros(len(x), self.columns)
        packed[:, : self.k], packed[:, self.k : 2 * self.k] = weights, indices.to(weights.dtype)
        return self.experts(x, packed)


def local(weights: Tensor, chosen: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Choices by this rank's own numbers, for experts that do not read the map of expert parallelism and would look for
    another rank's beyond their memory. own int [experts]: the number here, or -1; such a choice weighs nothing."""
    here = own[chosen.long()].to(chosen.dtype)
    return weights.masked_fill(here < 0, 0.0), here.clamp_min(0)
