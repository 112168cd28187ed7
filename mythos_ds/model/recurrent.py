"""The recurrent block: distinct layers run n_loops times with the same weights.

This module owns the whole loop, which makes it the unit that ZeRO-3 gathers: once in forward and once in backward,
whatever the loop count (docs/deepspeed.md says what goes wrong otherwise). A pipeline stage that holds only some of the
layers calls `begin`, `run_layers` and `end` itself; exit rules and studies run single loops by `start` and `step`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos_ds.config.layout import ModelChunk
from mythos_ds.config.schema import ActivationCheckpointing, ModelConfig
from mythos_ds.kernels.attention import AttentionCore
from mythos_ds.model.auxiliary_losses import attach_loss
from mythos_ds.model.cache_entry import CacheEntries, CacheEntry
from mythos_ds.model.context import ForwardContext, HaltedPositions
from mythos_ds.model.exit_gate import ExitGate
from mythos_ds.model.halting import Halting, HaltingState
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.injection import Injection
from mythos_ds.model.layers import MoEFactory, RecurrentLayer
from mythos_ds.model.loop_conditioning import DepthwiseLoRA, LoopEmbedding
from mythos_ds.model.loop_index import LoopIndex
from mythos_ds.model.moe import MoE
from mythos_ds.model.norm import RMSNorm
from mythos_ds.model.steps import Steps, finish

Result = TypeVar("Result")


class LaneDriver(Protocol):
    """Runs parts of a micro-batch, its lanes, in turn, so that one computes while the rows of the others travel."""

    def split(self, context: ForwardContext, positions: Tensor | None, rows: int) -> ForwardContext:
        """Adds to the context of a micro-batch of `rows` sequences those of its lanes, if it has any; positions int64
        [batch, seq] as the model is given them."""
        ...

    def run(
        self, block: "RecurrentBlock", x: Tensor, loop: int, context: ForwardContext, e: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Does what `run_layers` does, without halting and cache entries, by `layer_steps` of each lane."""
        ...


class RecurrentBlock(nn.Module):
    """h_0 = 0; h_{t+1} = A h_t + B e + Transformer_t(h_t, e): e [batch, seq, dim] -> h_T fp32 [batch, seq, dim].

    `pre`: the layers' residual branches are evaluated at the injected state x = A h + B e. `post`: the layers run on
    norm(h + e) and their output is added. The state is carried in fp32 unless the config says otherwise. Holds the
    layers of `part`, and the rest (injection, loop embedding, LoRA, halting, gate) where part.loops.
    """

    def __init__(
        self,
        config: ModelConfig,
        init: Initializer,
        part: ModelChunk,
        *,
        attention_core: AttentionCore,
        moe_factory: MoEFactory,
        activation_checkpointing: ActivationCheckpointing,
    ):
        super().__init__()
        self.post = config.injection == "post"
        self.starts_from_e = config.initial_state == "embedding"
        self.state_dtype = torch.bfloat16 if config.state_dtype == "bfloat16" else torch.float32
        self.lora_at_input = config.lora_target == "input"
        # What has gradient and follows the last layer's mixture keeps what the mixture gave.
        ends_later = config.halting in ("act", "act_openmythos") or (config.lora_rank and not self.lora_at_input)
        by_loop = activation_checkpointing == "loop"
        self.keeps_results = config.norm_placement == "after" or bool(by_loop and ends_later)
        self.activation_checkpointing = activation_checkpointing
        self.lane_driver: LaneDriver | None = None
        self.loop_embedding: LoopEmbedding | None = None
        self.lora: DepthwiseLoRA | None = None
        self.norm: RMSNorm | None = None
        self.halting: Halting | None = None
        self.gate: ExitGate | None = None
        if part.loops:
            self._add_own_parts(config, init)
        layers = init.at("layers")
        self.layers = nn.ModuleDict(
            {str(i): RecurrentLayer(config, layers.at(i), attention_core, moe_factory, i) for i in part.recurrent}
        )

    def _add_own_parts(self, config: ModelConfig, init: Initializer) -> None:
        self.injection = Injection(config)
        if config.loop_embedding != "none":
            self.loop_embedding = LoopEmbedding(config)
        if config.lora_rank:
            self.lora = DepthwiseLoRA(config, init.at("lora"))
        if self.post:
            self.norm = RMSNorm(config.dim, config.norm_eps)
        if config.halting == "gate":
            self.gate = ExitGate(config, init.at("gate"))
        elif config.halting != "none":
            self.halting = Halting(config)

    def forward(self, e: Tensor, n_loops: int, context: ForwardContext) -> Tensor:
        """Runs n_loops loops, the first n_loops - context.n_grad_loops of them without gradient."""
        h = self.start(e, context)
        halting = None if self.halting is None else HaltingState.start(h)
        with self.adding_up():
            h, halting = self._run_loops(h, e, n_loops, context, halting)
        if halting is None:
            return h.float()
        return self._with_ponder_cost(halting, context)

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        """Lets the gradients of each layer's experts add up in one place over the loops meanwhile."""
        with ExitStack() as stack:
            for moe in self.moe_layers():
                stack.enter_context(moe.experts.adding_up())
            yield

    def _run_loops(
        self, h: Tensor, e: Tensor, n_loops: int, context: ForwardContext, halting: HaltingState | None
    ) -> tuple[Tensor, HaltingState | None]:
        first = h
        for loop in range(n_loops):
            with_gradient = torch.is_grad_enabled() and loop >= n_loops - context.n_grad_loops
            with torch.set_grad_enabled(with_gradient):
                h, halting = self.step(h, e, loop=loop, last=loop == n_loops - 1, context=context, halting=halting)
            if context.depths is not None:
                # Never without gradient: h_0 may be e, whose gradient a sequence that begins later needs.
                h = torch.where(context.depths.begun(loop)[:, None, None], h, first)
            if context.records.wants_states:
                context.records.note_state(loop, h)
        return h, halting

    def start(self, e: Tensor, context: ForwardContext) -> Tensor:
        """Makes the state before the first loop, h_0, for e [batch, seq, dim]."""
        h = e.to(self.state_dtype) if self.starts_from_e else torch.zeros_like(e, dtype=self.state_dtype)
        if context.records.wants_states:
            with torch.no_grad():
                context.records.start(h, self.injection.decay())
        return h

    def begin(self, h: Tensor, e: Tensor, loop: LoopIndex) -> tuple[Tensor, Tensor]:
        """Computes what a loop's first layer reads, and the injected state A h + B e: both fp32 [batch, seq, dim]."""
        injected = self.injection(h, e)
        x = h if self.post else injected
        if self.loop_embedding is not None:
            x = x + self.loop_embedding(h, loop)
        if self.norm is not None:
            x = self.norm(x + e).float()
        if self.lora is not None and self.lora_at_input:
            x = x + self.lora(x, loop)
        return x, injected

    def run_layers(
        self,
        x: Tensor,
        loop: int,
        context: ForwardContext,
        halting: HaltingState | None = None,
        e: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, CacheEntries]:
        """Runs the layers held here once: x fp32 [batch, seq, dim] -> the new x, None and their cache entries; with e
        from the state h = x on, as `begin` does, the second result being the injected state."""
        if self.lane_driver is not None and context.lanes:
            return (*self.lane_driver.run(self, x, loop, context, e), CacheEntries())
        injected, entries = None, CacheEntries()
        for layer in map(int, self.layers):
            halted = None if halting is None else halting.halted_positions(loop, layer)
            arguments = context, x, e, (loop, layer), halted
            x, begun, entries[loop, layer] = self.recomputed("layer", self._layer, *arguments, last=layer)
            injected, e = begun if injected is None else injected, None
        return x, injected, entries

    def _layer(
        self, context: ForwardContext, x: Tensor, e: Tensor | None, key: tuple[int, int], halted: HaltedPositions | None
    ) -> tuple[Tensor, Tensor | None, CacheEntry]:
        return finish(self.layer_steps(context, x, e, key, halted))

    def layer_steps(
        self,
        context: ForwardContext,
        x: Tensor,
        e: Tensor | None,
        key: tuple[int, int],
        halted: HaltedPositions | None = None,
    ) -> Steps[tuple[Tensor, Tensor | None, CacheEntry]]:
        """Runs a layer in a loop, both of `key`, from x, or with e from the state h = x on, and stops where its mixture
        does: the new x, with e the injected state, and its cache entry."""
        (loop, layer), injected = key, None
        if e is not None:  # here, so that by layer h alone is kept of what begins a loop
            x, injected = self.begin(x, e, context.index_at(loop))
        x, entry = yield from cast(RecurrentLayer, self.layers[str(layer)]).steps(x, loop, context, halted)
        return x, injected, entry

    def recomputed(
        self,
        unit: Literal["layer", "loop"],
        function: Callable[..., Result],
        context: ForwardContext,
        *arguments: Any,
        last: int | None = None,
    ) -> Result:
        """Calls function(context, *arguments), which ends with layer `last`, None: the last one here. A block made to
        recompute by `unit` keeps the arguments alone, and calls it again in backward, with the same routing."""
        if self.activation_checkpointing != unit or not torch.is_grad_enabled():
            return function(context, *arguments)
        ends = max(map(int, self.layers)) if last is None else last
        arguments = context.for_recompute(None if self.keeps_results else ends), *arguments
        return cast(Result, checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False))

    def end(self, x: Tensor, injected: Tensor | None, loop: LoopIndex) -> Tensor:
        """Computes the state after `loop` from the last layer's output x and, with `post`, the injected state."""
        if self.lora is not None and not self.lora_at_input:
            x = x + self.lora(x, loop)
        if self.post and injected is not None:
            x = injected + x
        return x.to(self.state_dtype)

    def step(
        self,
        h: Tensor,
        e: Tensor,
        *,
        loop: int,
        context: ForwardContext,
        last: bool = False,
        halting: HaltingState | None = None,
    ) -> tuple[Tensor, HaltingState | None]:
        """Runs one loop, counted from 0: the state h and the input e [batch, seq, dim] -> the new h and halting state.

        `last`: ACT gives the last loop what is left of a position's weight. `halting` None: no position halts. The
        loop, or each of its layers, is recomputed in backward where the block was made so.
        """
        return self.recomputed("loop", self._loop, context, h, e, loop, last, halting)

    def _loop(
        self, context: ForwardContext, h: Tensor, e: Tensor, loop: int, last: bool, halting: HaltingState | None
    ) -> tuple[Tensor, HaltingState | None]:
        x, injected, entries = self.run_layers(h, loop, context, halting, e)
        new = self.end(x, injected, context.index_at(loop))
        if self.halting is None or halting is None:
            return new, None
        if self.halting.exact:
            new = torch.where(halting.halted[..., None], h, new)
        return new, self.halting.step(halting, new, entries, last)

    def _with_ponder_cost(self, halting: HaltingState, context: ForwardContext) -> Tensor:
        aux = context.aux
        if aux is None or not aux.ponder or not torch.is_grad_enabled():
            return halting.output
        return attach_loss(halting.output, halting.ponder.mean() * (aux.ponder * aux.scale))

    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts layers held here, in order."""
        return [cast(RecurrentLayer, layer).moe for layer in self.layers.values()]
