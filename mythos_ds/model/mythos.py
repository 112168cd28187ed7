"""The recurrent-depth transformer: embedding, prelude, looped block, coda, head."""

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.attention import rotary_width
from mythos_ds.model.context import AuxLoss, ForwardContext
from mythos_ds.model.documents import DocumentBounds
from mythos_ds.model.initializer import Embedding, Initializer
from mythos_ds.model.layers import DenseLayer, MoEFactory
from mythos_ds.model.loss import LMHead
from mythos_ds.model.moe import MoE
from mythos_ds.model.norm import RMSNorm
from mythos_ds.model.recurrent import RecurrentBlock
from mythos_ds.model.rope import Rotary


class MythosModel(nn.Module):
    """Recurrent-depth mixture-of-experts language model; depth is an argument of the forward.

    `moe_factory` builds the experts' layer (expert parallelism passes its own); `checkpoint_loops` recomputes each loop
    in backward, so that activation memory hardly grows with the loop count.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        moe_factory: MoEFactory = MoE,
        checkpoint_loops: bool = False,
    ):
        super().__init__()
        init = Initializer(seed)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim, init.at("embed"), config.embedding_std)
        self.prelude = nn.ModuleList(
            DenseLayer(config, init.at("prelude").at(i)) for i in range(config.prelude_layers)
        )
        self.prelude_norm = RMSNorm(config.dim, config.norm_eps) if config.prelude_norm else None
        self.recurrent = RecurrentBlock(
            config, init.at("recurrent"), moe_factory, checkpoint_loops=checkpoint_loops
        )
        self.coda = nn.ModuleList(DenseLayer(config, init.at("coda").at(i)) for i in range(config.coda_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        tied = self.embed.weight if config.tie_embeddings else None
        self.lm_head = LMHead(config, init.at("lm_head"), tied)

    def forward(
        self,
        tokens: Tensor,
        *,
        n_loops: int,
        n_grad_loops: int | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        aux: AuxLoss | None = None,
    ) -> Tensor:
        """tokens int64 [batch, seq] -> fp32 logits [batch, seq, vocab], or the scalar mean loss where labels are given.

        n_grad_loops: the last loops that get a gradient (None: all). positions int64 [batch, seq] restart at 0 where a
        document starts (None: one document per sequence). Raises ValueError for a loop count below 1.
        """
        if n_loops < 1 or (n_grad_loops is not None and n_grad_loops < 1):
            raise ValueError(f"n_loops ({n_loops}) and n_grad_loops ({n_grad_loops}) must be at least 1")
        context = self.make_context(tokens, positions, aux, min(n_grad_loops or n_loops, n_loops))
        x = self.embed(tokens)
        for layer in self.prelude:
            x = layer(x, context)
        e = x if self.prelude_norm is None else self.prelude_norm(x)
        x = self.recurrent(e, n_loops, context).to(e.dtype)
        for layer in self.coda:
            x = layer(x, context)
        return self.lm_head(self.norm(x), labels)

    def make_context(
        self, tokens: Tensor, positions: Tensor | None, aux: AuxLoss | None, n_grad_loops: int
    ) -> ForwardContext:
        """Rotary tables and document bounds of a micro-batch."""
        documents = None if positions is None else DocumentBounds.from_positions(positions)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        config = self.config
        rotary = Rotary.at(positions, rotary_width(config), config.rope_theta, config.rope_interleaved)
        return ForwardContext(rotary, documents, aux, n_grad_loops)

    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts layers, in order."""
        return self.recurrent.moe_layers()


def clear_records(model: MythosModel) -> None:
    """Forgets the notes of the last forward."""
    model.recurrent.loop_records.clear()
    for moe in model.moe_layers():
        moe.records.clear()
