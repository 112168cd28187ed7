"""The recurrent block: distinct layers run n_loops times with the same weights.

This module owns the whole loop, which makes it the unit that ZeRO-3 gathers: once in forward and once in backward,
whatever the loop count (docs/deepspeed.md says what goes wrong otherwise).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.auxiliary import attach_loss
from mythos_ds.model.context import ForwardContext
from mythos_ds.model.halting import Halting, HaltingState
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.injection import Injection
from mythos_ds.model.layers import MoEFactory, RecurrentLayer
from mythos_ds.model.loop_identity import DepthwiseLoRA, LoopEmbedding
from mythos_ds.model.moe import MoE
from mythos_ds.model.norm import RMSNorm
from mythos_ds.model.records import LoopRecord

KeysValues = tuple[tuple[Tensor, ...], ...]


class RecurrentBlock(nn.Module):
    """h_0 = 0; h_{t+1} = A h_t + B e + Transformer_t(h_t, e): e [batch, seq, dim] -> h_T fp32 [batch, seq, dim].

    `pre`: the layers' residual branches are evaluated at the injected state x = A h + B e. `post`: the layers run on
    norm(h + e) and their output is added. The state is carried in fp32 unless the config says otherwise.
    """

    def __init__(
        self, config: ModelConfig, init: Initializer, moe_factory: MoEFactory, *, checkpoint_loops: bool
    ):
        super().__init__()
        self.post = config.injection == "post"
        self.starts_from_e = config.initial_state == "embedding"
        self.state_dtype = torch.bfloat16 if config.state_dtype == "bfloat16" else torch.float32
        self.lora_at_input = config.lora_target == "input"
        self.checkpoint_loops = checkpoint_loops
        self.injection = Injection(config)
        self.loop_embedding = None if config.loop_embedding == "none" else LoopEmbedding(config)
        self.lora = DepthwiseLoRA(config, init.at("lora")) if config.lora_rank else None
        self.norm = RMSNorm(config.dim, config.norm_eps) if self.post else None
        self.halting = None if config.halting == "none" else Halting(config)
        self.layers = nn.ModuleList(
            RecurrentLayer(config, init.at("layers").at(i), moe_factory) for i in range(config.recurrent_layers)
        )
        self.track_loops = False
        self.loop_records: dict[int, LoopRecord] = {}
        self.decay_maximum: Tensor | None = None

    def forward(self, e: Tensor, n_loops: int, context: ForwardContext) -> Tensor:
        """Runs n_loops loops, the first n_loops - context.n_grad_loops of them without gradient."""
        self._clear_records()
        h = e.to(self.state_dtype) if self.starts_from_e else torch.zeros_like(e, dtype=self.state_dtype)
        halting = None if self.halting is None else HaltingState.start(h)
        for loop in range(n_loops):
            with_gradient = torch.is_grad_enabled() and loop >= n_loops - context.n_grad_loops
            before = h
            with torch.set_grad_enabled(with_gradient):
                h, halting = self._run(h, e, loop, loop == n_loops - 1, context, halting)
            if self.track_loops:
                self._record(loop, before, h)
        if halting is None:
            return h.float()
        return self._with_ponder_cost(halting, context)

    def _run(self, *arguments: Any) -> tuple[Tensor, HaltingState | None]:
        if self.checkpoint_loops and torch.is_grad_enabled():
            return checkpoint(self._loop, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._loop(*arguments)

    def _loop(
        self, h: Tensor, e: Tensor, loop: int, last: bool, context: ForwardContext, halting: HaltingState | None
    ) -> tuple[Tensor, HaltingState | None]:
        new, keys_values = self._transition(h, e, loop, context, halting)
        new = new.to(self.state_dtype)
        if self.halting is None or halting is None:
            return new, None
        if self.halting.exact:
            new = torch.where(halting.halted[..., None], h, new)
        return new, self.halting.step(halting, new, keys_values, last)

    def _transition(
        self, h: Tensor, e: Tensor, loop: int, context: ForwardContext, halting: HaltingState | None
    ) -> tuple[Tensor, KeysValues]:
        injected = self.injection(h, e)
        x = h if self.post else injected
        if self.loop_embedding is not None:
            x = x + self.loop_embedding(h, loop)
        if self.norm is not None:
            x = self.norm(x + e).float()
        if self.lora is not None and self.lora_at_input:
            x = x + self.lora(x, loop)
        keys_values = []
        for index, layer in enumerate(self.layers):
            x, kept = layer(x, loop, context, None if halting is None else halting.frozen(index))
            keys_values.append(kept)
        if self.lora is not None and not self.lora_at_input:
            x = x + self.lora(x, loop)
        return injected + x if self.post else x, tuple(keys_values)

    def _with_ponder_cost(self, halting: HaltingState, context: ForwardContext) -> Tensor:
        aux = context.aux
        if aux is None or not aux.ponder or not torch.is_grad_enabled():
            return halting.output
        return attach_loss(halting.output, halting.ponder.mean() * (aux.ponder * aux.scale))

    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts layers, in order."""
        return [cast(RecurrentLayer, layer).moe for layer in self.layers]

    def _clear_records(self) -> None:
        self.loop_records.clear()
        for moe in self.moe_layers():
            moe.records.clear()

    @torch.no_grad()
    def _record(self, loop: int, before: Tensor, after: Tensor) -> None:
        before, after = before.detach().float(), after.detach().float()
        norm = after.norm().clamp_min(1e-30)
        self.loop_records[loop] = LoopRecord(after.square().mean().sqrt(), (after - before).norm() / norm)
        if loop == 0:
            self.decay_maximum = self.injection.decay().detach().float().amax()
