"""Layers, and the block that runs them in a loop.

h_0 = 0; h_{t+1} = A h_t + B e + Transformer(h_t, e) for t < n_loops, with the same weights in every loop; e is the
normed output of the prelude. State and injection compute in fp32, whatever the weights' type.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention_mythos import MythosAttention, MythosContext, MythosRMSNorm, rms
from .configuration_mythos import MythosConfig
from .experts_mythos import MythosMLP, MythosMoE

_DECAY_CAP = {"float32": 1.0 - 1e-4, "bfloat16": 1.0 - 2.0**-8}


class MythosLayer(nn.Module):
    """A layer: dense outside the loop (loop=None), with experts and an fp32 stream inside; `index` counts through
    prelude, block and coda."""

    def __init__(self, config: MythosConfig, looped: bool, index: int):
        super().__init__()
        add_norms(self, config)
        self.self_attn = MythosAttention(config, index)
        self.mlp = MythosMoE(config) if looped else MythosMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, context: MythosContext, slot: int, loop: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [batch, seq, dim] -> the same, and attention's weights where it has them."""
        own = () if loop is None else (loop,)
        weights: list[Tensor | None] = []

        def attend(x: Tensor) -> Tensor:
            out, found = self.self_attn(x, context, slot)
            weights.append(found if context.attentions else None)
            return out

        return residual(self, x, attend, lambda x: self.mlp(x, *own)), weights[0]


def add_norms(layer: Any, config: MythosConfig) -> None:
    """Gives a layer its two norms: before attention and feed-forward, or after them, as in OLMo 2."""
    after = layer.norms_after = config.norm_placement == "after"
    for name in ("post_attention_layernorm", "post_feedforward_layernorm" if after else "input_layernorm"):
        setattr(layer, name, MythosRMSNorm(config.hidden_size, config.rms_norm_eps))


def residual(layer: Any, x: Tensor, attend: Callable[[Tensor], Tensor], mix: Callable[[Tensor], Tensor]) -> Tensor:
    """The stream x [..., dim] after a layer with `add_norms`'s norms, of its attention and feed-forward."""
    if layer.norms_after:
        dtype = layer.post_attention_layernorm.weight.dtype  # an fp32 stream meets branches of the weights' type
        x = x + layer.post_attention_layernorm(attend(x.to(dtype)))
        return x + layer.post_feedforward_layernorm(mix(x.to(dtype)))
    x = x + attend(layer.input_layernorm(x))
    return x + mix(layer.post_attention_layernorm(x))


class MythosRecord:
    """What a forward keeps beside the stream, in the order of its computation."""

    def __init__(self) -> None:
        self.hidden_states: list[Tensor] = []
        self.attentions: list[Tensor] = []
        self.loop_states: list[Tensor] = []

    def add(self, states: list[Tensor], attentions: list[Tensor]) -> None:
        """Appends those of some layers."""
        self.hidden_states += states
        self.attentions += attentions


class MythosInjection(nn.Module):
    """A h + B e, diagonal, in fp32: A = exp(-dt exp(log_A)) with dt = softplus(dt_bias)."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.discretisation = config.discretisation
        self.state_dtype = getattr(torch, config.state_dtype)
        self.least = math.log(-math.log(_DECAY_CAP[config.state_dtype]) * 1.002)
        self.log_A = nn.Parameter(torch.zeros(config.hidden_size))
        if config.discretisation == "direct":
            self.log_dt = nn.Parameter(torch.zeros(1))
        else:
            self.dt_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.B = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        if self.discretisation == "direct":
            rate = (self.log_dt.float() + self.log_A.float()).clamp(-20.0, 20.0).exp()
            gain = self.B.float()
        else:
            bias = self.dt_bias.float()
            dt = functional.softplus(bias)
            log_dt = torch.where(bias < -16.0, bias, dt.clamp_min(1e-30).log())
            rate = (log_dt + self.log_A.float()).clamp(self.least, math.log(30.0)).exp()
            step = dt if self.discretisation == "euler" else dt * (-torch.expm1(-rate) / rate)
            gain = step * self.B.float()
        decay = torch.exp(-rate).to(self.state_dtype)
        return (decay * h).float() + gain * e.float()


class MythosLoopEmbedding(nn.Module):
    """A sinusoid of the loop index: with a learned gain and held at the mean recurrence, or raw on an eighth."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.dim, self.last = config.hidden_size, config.mean_recurrence - 1
        self.gain = nn.Parameter(torch.zeros(self.dim)) if config.loop_embedding == "scaled" else None

    def forward(self, loop: int, device: torch.device) -> Tensor:
        width = self.dim // 8 if self.gain is None else self.dim
        index = loop if self.gain is None else min(loop, self.last)
        exponent = torch.arange(0, width, 2, device=device).float() / width
        angle = index * torch.pow(torch.full_like(exponent, 10000.0), -exponent)
        table = torch.cat([angle.sin(), angle.cos()])[:width]
        return functional.pad(table, (0, self.dim - width)) if self.gain is None else self.gain.float() * table


class MythosLoRA(nn.Module):
    """up(scale[loop] * down(x)); loops beyond the table use its last row."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.eps = config.rms_norm_eps if config.lora_target == "input" else None
        self.down = nn.Linear(config.hidden_size, config.lora_rank, bias=False)
        self.up = nn.Linear(config.lora_rank, config.hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(config.max_loops, config.lora_rank))

    def forward(self, x: Tensor, loop: int) -> Tensor:
        dtype = self.scale.dtype  # the matrices' own may be whole numbers
        inner = (x if self.eps is None else rms(x, self.eps)).to(dtype)
        return self.up(self.down(inner) * self.scale[min(loop, len(self.scale) - 1)].to(dtype))


def run_part(owner: Any, number: int, part: Callable[..., Any], *given: Any) -> Any:
    """part(*given), recomputed in the backward pass where the owner's gradient checkpointing takes the part of this
    number.

    Raises ValueError for checkpoints that re-enter autograd among several processes: weights that are used in every
    loop then get their gradient in several backward passes, which DistributedDataParallel does not allow and DeepSpeed
    turns into wrong gradients.
    """
    if not (checkpoints(owner) and number % owner.checkpoint_every == 0):
        return part(*given)
    if owner.reentrant and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError(
            "gradient checkpointing: given use_reentrant=True with several processes; allowed: "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, since the loop uses its weights several times'
        )
    return owner._gradient_checkpointing_func(part, *given)


def checkpoints(owner: Any) -> bool:
    """Whether a forward of a module keeps parts of its activations only, to compute the others again."""
    return owner.gradient_checkpointing and owner.training and torch.is_grad_enabled()


class MythosRecurrentBlock(nn.Module):
    """The looped layers with what tells them the loop and feeds e in. `layers`: those of another engine.

    With gradient checkpointing a loop keeps h only, and is computed again as a whole."""

    gradient_checkpointing = reentrant = False
    checkpoint_every = 1

    def __init__(self, config: MythosConfig, layers: list[nn.Module] | None = None):
        super().__init__()
        self.config = config
        self.injection = MythosInjection(config)
        self.loop_embedding = MythosLoopEmbedding(config) if config.loop_embedding != "none" else None
        self.lora = MythosLoRA(config) if config.lora_rank else None
        self.norm = MythosRMSNorm(config.hidden_size, config.rms_norm_eps) if config.injection == "post" else None
        first, count = config.num_prelude_layers, config.num_recurrent_layers
        own = layers or [MythosLayer(config, looped=True, index=first + i) for i in range(count)]
        self.layers = nn.ModuleList(own)

    def run_layers(self, x: Tensor, loop: int, context: Any) -> tuple[Tensor, list[Tensor]]:
        """The layers once, [batch, seq, dim], and what the caller keeps of them: hidden states, then attentions. Each
        (loop, layer) has a slot of the cache."""
        states, attentions = [], []
        for index, layer in enumerate(self.layers):
            slot = self.config.num_prelude_layers + self.config.num_coda_layers + loop * len(self.layers) + index
            x, weights = layer(x, context, slot, loop)
            states += [x] if context.hidden_states else []
            attentions += [weights] if context.attentions else []
        return x, [*states, *attentions]

    def step(self, h: Tensor, e: Tensor, loop: int, context: Any) -> tuple[Tensor, ...]:
        """One loop: the next h, and what `run_layers` says of its layers."""
        injected = self.injection(h, e)
        x = h if self.norm is not None else injected
        if self.loop_embedding is not None:
            x = x + self.loop_embedding(loop, x.device)
        if self.norm is not None:
            x = self.norm(x + e).float()
        if self.lora is not None and self.config.lora_target == "input":
            x = x + self.lora(x, loop)
        x, kept = self.run_layers(x, loop, context)
        if self.lora is not None and self.config.lora_target == "output":
            x = x + self.lora(x, loop)
        return (x if self.norm is None else injected + x).to(h.dtype), *kept

    def forward(self, e: Tensor, n_loops: int, context: Any, record: MythosRecord | None = None) -> Tensor:
        """e [batch, seq, dim] -> h after n_loops, fp32. context: what the layers take, MythosContext for one's own.
        record: where the caller keeps more."""
        dtype = getattr(torch, self.config.state_dtype)
        h = e.to(dtype) if self.config.initial_state == "embedding" else torch.zeros_like(e, dtype=dtype)
        for loop in range(n_loops):
            h, *kept = run_part(self, self.config.num_prelude_layers + loop, self.step, h, e, loop, context)
            if record is not None:
                states = len(self.layers) if context.hidden_states else 0
                record.add(kept[:states], kept[states:])
                record.loop_states += [h.float()] if context.hidden_states else []
        return h.float()
