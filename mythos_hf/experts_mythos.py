"""Feed-forwards: dense, and routed experts with their router."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.utils.generic import maybe_autocast

from .configuration_mythos import MythosConfig, filled

_MIN_ROW_UPDATES = 100
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The stacked parameters, and what files call the parts of an expert."""


class MythosMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@use_experts_implementation
class MythosExperts(nn.Module):
    """Routed experts, stacked; files hold them one by one."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.num_experts, hidden, dim = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, dim, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, dim], indices and weights [tokens, k] -> [tokens, dim]."""
        out = torch.zeros_like(x)
        for expert in indices.unique().tolist():
            tokens, place = torch.where(indices == expert)
            gate, up = functional.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, tokens, rows * weights[tokens, place, None])
        return out

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """Also takes experts one by one, as files hold them: transformers' Trainer reads its checkpoints without
        stacking them, and would leave all experts as they are. A file of several may hold some; others stay."""
        for name, parts in _STACKED.items():
            own = [[f"{prefix}{expert}.{part}.weight" for part in parts] for expert in range(self.num_experts)]
            if not any(key in state_dict for keys in own for key in keys):
                continue
            stack: Tensor = getattr(self, name).detach()
            stack = torch.empty_like(stack, device="cpu") if stack.is_meta else stack.clone()
            for rows, keys in zip(stack, own, strict=True):
                for place, key in zip(rows.chunk(len(keys)), keys, strict=True):
                    if key not in state_dict:
                        missing.append(key)
                    elif (value := state_dict.pop(key)).shape == place.shape:
                        place.copy_(value)
                    else:
                        errors.append(f"{key}: given {list(value.shape)}; allowed: {list(place.shape)}")
            state_dict[f"{prefix}{name}"] = stack
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class MythosRouter(nn.Module):
    """Token-choice routing in fp32; the selection bias, shared and of each loop, does not enter the weights."""

    e_score_correction_bias: Tensor
    loop_correction_bias: Tensor
    loop_updates: Tensor

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("loop_correction_bias", torch.zeros(config.max_loops, experts))
        self.register_buffer("loop_updates", torch.zeros(config.max_loops))

    def forward(self, x: Tensor, loop: int) -> tuple[Tensor, Tensor]:
        """x [tokens, dim] -> indices int64 and weights fp32, both [tokens, k]."""
        with maybe_autocast(x.device.type, enabled=False):  # which would choose other experts
            logits = functional.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        # Loops deeper than any trained one use the last trained one's bias.
        trusted = ((self.loop_updates >= _MIN_ROW_UPDATES).sum() - 1).clamp_min(0).clamp_max(loop)
        bias = self.e_score_correction_bias + self.loop_correction_bias.index_select(0, trusted.view(-1))[0]
        choice = scores + bias.float()
        if self.config.n_group is not None and self.config.topk_group is not None:
            grouped = choice.unflatten(-1, (self.config.n_group, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = best.topk(self.config.topk_group, dim=-1).indices
            allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
            choice = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        indices = choice.topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, indices)
        return indices, weights / weights.sum(-1, keepdim=True).clamp_min(1e-20) * self.config.routed_scaling_factor


class MythosMoE(nn.Module):
    """Routed and shared experts."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.router = MythosRouter(config)
        self.experts = MythosExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * filled(config.shared_expert_intermediate_size)
            self.shared_experts = MythosMLP(config.hidden_size, width)

    def forward(self, x: Tensor, loop: int) -> Tensor:
        rows = x.flatten(0, -2)
        indices, weights = self.router(rows, loop)
        routed = self.experts(rows, indices, weights.to(rows.dtype)).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)
