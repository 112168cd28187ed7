"""Transformer layers, dense ones for prelude and coda, MoE ones for the recurrent block: norms stand before attention
and feed-forward, or after them on what they add to the stream (OLMo 2, arXiv 2501.00656)."""

from typing import Protocol

from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels.attention import AttentionCore
from mythos_ds.model.attention import make_attention
from mythos_ds.model.cache_entry import CacheEntry
from mythos_ds.model.context import ForwardContext, HaltedPositions
from mythos_ds.model.feed_forward import FeedForward
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.moe import MoE
from mythos_ds.model.norm import AddRMSNorm, RMSNorm
from mythos_ds.model.steps import Steps, finish


class MoEFactory(Protocol):
    """Builds the mixture of experts of recurrent layer `layer`."""

    def __call__(self, config: ModelConfig, init: Initializer, *, layer: int) -> MoE: ...


class DenseLayer(nn.Module):
    """x + attention(norm x), then x + ffn(norm x); or x + norm(attention(x)), then x + norm(ffn(x)).

    [batch, seq, dim] -> [batch, seq, dim].
    """

    def __init__(self, config: ModelConfig, init: Initializer, core: AttentionCore, *, rotates: bool = True):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = make_attention(config, init.at("attn"), core, rotates=rotates)
        self.norms_after = config.norm_placement == "after"
        self.ffn_norm = (RMSNorm if self.norms_after else AddRMSNorm)(config.dim, config.norm_eps)
        stds = config.resolved_init_std, config.resolved_output_std
        self.ffn = FeedForward(config.dim, config.ffn_dim, init.at("ffn"), *stds)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        if self.norms_after:
            x = x + self.attn_norm(self.attn(x, context)[0])
            return x + self.ffn_norm(self.ffn(x))
        x, normed = self.ffn_norm(x, self.attn(self.attn_norm(x), context)[0])
        return x + self.ffn(normed)


class RecurrentLayer(nn.Module):
    """The same with a mixture of experts, and an fp32 residual stream: it carries the loop's state."""

    def __init__(
        self, config: ModelConfig, init: Initializer, core: AttentionCore, moe_factory: MoEFactory, layer: int
    ):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = make_attention(config, init.at("attn"), core, rotates=config.rotates("recurrent", layer))
        self.norms_after = config.norm_placement == "after"
        self.ffn_norm = (RMSNorm if self.norms_after else AddRMSNorm)(config.dim, config.norm_eps)
        self.moe = moe_factory(config, init.at("moe"), layer=layer)

    def forward(
        self, x: Tensor, loop: int, context: ForwardContext, halted: HaltedPositions | None = None
    ) -> tuple[Tensor, CacheEntry]:
        """Returns the new residual stream from x, both fp32 [batch, seq, dim], and the attention's cache entry."""
        return finish(self.steps(x, loop, context, halted))

    def steps(
        self, x: Tensor, loop: int, context: ForwardContext, halted: HaltedPositions | None = None
    ) -> Steps[tuple[Tensor, CacheEntry]]:
        """Does what `forward` does, and stops where the mixture does."""
        alive = None if halted is None else ~halted.halted
        if self.norms_after:
            dtype = self.attn_norm.weight.dtype  # in which the branches compute; the stream stays fp32
            attended, entry = self.attn(x.to(dtype), context, halted)
            x = x + self.attn_norm(attended)
            mixed = yield from self.moe.steps(x.to(dtype), loop, context, alive)
            return x + self.ffn_norm(mixed), entry
        attended, entry = self.attn(self.attn_norm(x), context, halted)
        x, normed = self.ffn_norm(x, attended)
        mixed = yield from self.moe.steps(normed, loop, context, alive, x)
        return mixed, entry
