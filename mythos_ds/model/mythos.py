"""The recurrent-depth transformer: embedding, prelude, looped block, coda, head."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mythos_ds.config.layout import ModelChunk, whole_model
from mythos_ds.config.schema import IGNORED_LABEL, ActivationCheckpointing, ModelConfig
from mythos_ds.kernels.attention import AttentionCore, causal_attention
from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.model.attention import rotary_width
from mythos_ds.model.context import AuxLoss, ForwardContext
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.halting import HaltingState
from mythos_ds.model.initializer import Embedding, Initializer
from mythos_ds.model.layers import DenseLayer, MoEFactory
from mythos_ds.model.lm_head import LMHead
from mythos_ds.model.moe import MoE
from mythos_ds.model.norm import RMSNorm
from mythos_ds.model.recurrent import LaneDriver, RecurrentBlock
from mythos_ds.model.rope import Rotary
from mythos_ds.model.sequence_depths import SequenceDepths


class MythosModel(nn.Module):
    """Recurrent-depth mixture-of-experts language model; depth is an argument of the forward.

    `attention_core` computes attention from q, k and v in every layer; `moe_factory` builds the experts' layer (expert
    parallelism passes its own); `activation_checkpointing`
    "layer" or "loop" computes each layer in each loop, or each loop, again in backward: one layer, or one loop, is held
    at a time, and of the others what it reads. `part` says which layers to hold (None:
    all); names and initial values of parameters do not depend on it, and `forward` needs all of them. `seed` None
    leaves the matrices zero, for weights that are loaded.

    A forward is `encode`, the looped block, `decode`; whoever wants to look between the loops calls `encode`,
    `start_loop`, `step_loop` for each loop and `decode` instead, with the same result.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = 0,
        attention_core: AttentionCore = causal_attention,
        moe_factory: MoEFactory = MoE,
        activation_checkpointing: ActivationCheckpointing = "none",
        part: ModelChunk | None = None,
    ):
        super().__init__()
        init = Initializer(seed)
        part = whole_model(config) if part is None else part
        self.config, self.part = config, part
        if part.embeds or (part.predicts and config.tie_embeddings):
            self.embed = Embedding(config.vocab_size, config.dim, init.at("embed"), config.embedding_std)
        self.lane_driver: LaneDriver | None = None
        self.prelude = _dense_layers(config, init, attention_core, "prelude", part.prelude)
        self.prelude_norm = RMSNorm(config.dim, config.norm_eps) if config.prelude_norm and part.loops else None
        self.recurrent = RecurrentBlock(
            config,
            init.at("recurrent"),
            part,
            attention_core=attention_core,
            moe_factory=moe_factory,
            activation_checkpointing=activation_checkpointing,
        )
        self.coda = _dense_layers(config, init, attention_core, "coda", part.coda)
        if part.predicts:
            self.norm = RMSNorm(config.dim, config.norm_eps)
            tied = self.embed.weight if config.tie_embeddings else None
            self.lm_head = LMHead(config, init.at("lm_head"), tied)

    @classmethod
    def from_preset(cls, name: str | Path, overrides: Sequence[str] = (), *, seed: int = 0) -> "MythosModel":
        """A new model of a preset or of a configuration's file. This and the next alone call upward, to `api`."""
        made: MythosModel = importlib.import_module("mythos_ds.api").new_model(name, overrides, seed=seed)
        return made

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "MythosModel":
        """A trained model in evaluation mode: "tiny", a model folder, a run or a checkpoint. Raises CheckpointError."""
        loaded: MythosModel = importlib.import_module("mythos_ds.api").open_model(source)
        return loaded

    def forward(
        self,
        tokens: Tensor,
        *,
        n_loops: int | None = None,
        n_grad_loops: int | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        aux: AuxLoss | None = None,
        records: ForwardRecords | None = None,
        depths: Tensor | None = None,
        loss_divisor: float | None = None,
    ) -> Tensor:
        """Runs the model: tokens int64 [batch, seq] -> fp32 logits [batch, seq, vocab], or the scalar mean loss where
        labels or targets are given.

        n_loops: None takes the configuration's mean_recurrence. n_grad_loops: the last loops that get a gradient (None:
        all). positions int64 [batch, seq] restart at 0 where a document starts (None: one document per sequence).
        labels int64 [batch, seq]: the tokens themselves, shifted here; those that are -100 do not count. targets int64
        [batch, seq]: the token after each token; all count. With a loss_divisor those that are -100 do not, and the sum
        of the others' losses is divided by it. `records` are filled and closed. depths int64 [batch], each 1 ..
        n_loops: loops of each sequence, not with ACT (None: n_loops; see SequenceDepths). Raises ValueError for a loop
        count below 1, labels beside targets, or depths with ACT or of another shape.
        """
        if labels is not None and targets is not None:
            raise ValueError("both labels and targets are given; allowed: labels (shifted inside) or targets (shifted)")
        n_loops = self.config.mean_recurrence if n_loops is None else n_loops
        if n_loops < 1 or (n_grad_loops is not None and n_grad_loops < 1):
            raise ValueError(f"n_loops ({n_loops}) and n_grad_loops ({n_grad_loops}) must be at least 1")
        own = None
        if depths is not None:
            if depths.shape != tokens.shape[:1] or self.config.halting in ("act", "act_openmythos"):
                raise ValueError(f"depths {list(depths.shape)} for tokens {list(tokens.shape)}, or with ACT")
            own = SequenceDepths(depths, n_loops)
        n_grad_loops = min(n_grad_loops or n_loops, n_loops)
        e, context = self.encode(
            tokens,
            positions=positions,
            n_grad_loops=n_grad_loops,
            aux=aux,
            records=records or ForwardRecords(),
            depths=own,
        )
        # The block's own call, not single steps: it is the unit that ZeRO-3 gathers, once for all loops.
        x = self.recurrent(e, n_loops, context).to(e.dtype)
        context.records.close()
        return self.decode(x, context=context, labels=labels, targets=targets, loss_divisor=loss_divisor)

    def encode(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        n_grad_loops: int = 1,
        aux: AuxLoss | None = None,
        records: ForwardRecords | None = None,
        depths: SequenceDepths | None = None,
    ) -> tuple[Tensor, ForwardContext]:
        """Runs embedding and prelude: tokens int64 [batch, seq] -> the loop's input e [batch, seq, dim], and the
        context that every loop and the coda take.

        records None: nothing is noted. The other arguments: see `forward`.
        """
        context = self.make_context(tokens, positions, aux, n_grad_loops, records or ForwardRecords.closed(), depths)
        return self.normed(self.run_prelude(self.embed(tokens), context)), context

    def start_loop(self, e: Tensor, *, context: ForwardContext) -> tuple[Tensor, HaltingState | None]:
        """Makes the state before the first loop, h_0 [batch, seq, dim], and for a model with ACT its halting state."""
        h = self.recurrent.start(e, context)
        return h, None if self.recurrent.halting is None else HaltingState.start(h)

    def step_loop(
        self,
        h: Tensor,
        e: Tensor,
        *,
        loop: int,
        context: ForwardContext,
        last: bool = False,
        halting: HaltingState | None = None,
    ) -> tuple[Tensor, HaltingState | None]:
        """Runs one loop, counted from 0: h, e [batch, seq, dim] and `encode`'s context -> the new h and halting state.

        `last` matters to ACT alone. halting None: no position halts. Without a depth per sequence.
        """
        return self.recurrent.step(h, e, loop=loop, context=context, last=last, halting=halting)

    def decode(
        self,
        h: Tensor,
        *,
        context: ForwardContext,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        loss_divisor: float | None = None,
    ) -> Tensor:
        """Runs coda and head on the state h [batch, seq, dim], with ACT the halting state's output: fp32 logits
        [batch, seq, vocab], or the scalar mean loss where labels or targets are given (see `forward`)."""
        x = self.run_coda(h.to(self.norm.weight.dtype), context)
        if labels is None:
            return self.logits_or_loss(x, targets, loss_divisor)
        return self.logits_or_loss(*_counted(x[:, :-1], labels[:, 1:]))

    def run_prelude(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Runs the prelude layers held here: [batch, seq, dim] -> [batch, seq, dim]."""
        for layer in self.prelude.values():
            x = layer(x, context)
        return x

    def normed(self, x: Tensor) -> Tensor:
        """Computes the loop's input e from the prelude's output x."""
        return x if self.prelude_norm is None else self.prelude_norm(x)

    def run_coda(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Runs the coda layers held here: [batch, seq, dim] -> [batch, seq, dim]."""
        for layer in self.coda.values():
            x = layer(x, context)
        return x

    def logits_or_loss(self, x: Tensor, targets: Tensor | None, loss_divisor: float | None = None) -> Tensor:
        """Applies the head to the coda's output x: fp32 logits, or the scalar loss where targets are given (see
        `forward`)."""
        if targets is None or loss_divisor is None:
            return self.lm_head(self.norm(x), targets)
        x, targets = _counted(x, targets)
        return self.lm_head(self.norm(x), targets, loss_divisor)

    def make_context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        aux: AuxLoss | None,
        n_grad_loops: int,
        records: ForwardRecords | None = None,
        depths: SequenceDepths | None = None,
    ) -> ForwardContext:
        """Makes the rotary tables, document bounds and records of a micro-batch, and those of its lanes. Positions that
        are still on the CPU, wherever the tokens are, save a wait for the device: the bounds are read off there."""
        documents, given = None, positions
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        else:
            documents = DocumentBounds.from_positions(positions, tokens.device)
            positions = positions.to(tokens.device, non_blocking=True)
        config = self.config
        shape = rotary_width(config), config.rope_theta, config.rope_interleaved
        rotary = Rotary.at(positions, *shape, config.rope_scaling)
        records = records or ForwardRecords()
        records.depths = depths
        context = ForwardContext(rotary, documents, aux, n_grad_loops, records, depths)
        return context if self.lane_driver is None else self.lane_driver.split(context, given, tokens.shape[0])

    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts layers held here, in order."""
        return self.recurrent.moe_layers()


def _counted(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x [batch, seq, dim] and the targets [batch, seq] that count: [n, dim], [n]. Waits for the device."""
    places = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
    return x[places], targets[places]


def _dense_layers(
    config: ModelConfig,
    init: Initializer,
    core: AttentionCore,
    name: Literal["prelude", "coda"],
    indices: tuple[int, ...],
) -> nn.ModuleDict:
    own = init.at(name)
    return nn.ModuleDict(
        {str(i): DenseLayer(config, own.at(i), core, rotates=config.rotates(name, i)) for i in indices}
    )
