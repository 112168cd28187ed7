"""The looped model on vLLM: the export's recurrence around vLLM's matrices, attention, caches and experts.

The loop count is the configuration's, which `--hf-overrides '{"n_loops": 8}'` changes for a server; requests may ask
for fewer (request_loops.py). Attention heads, feed-forwards and experts are divided among tensor-parallel ranks; norms,
router, injection, LoRA and loop tables are on each of them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from mythos_hf.attention_mythos import MythosRMSNorm
from mythos_hf.configuration_mythos import MythosConfig, filled
from mythos_hf.experts_mythos import MythosRouter
from mythos_hf.recurrent_mythos import MythosInjection, MythosLoopEmbedding, add_norms, residual
from mythos_hf.rotary_mythos import rotary_tables
from mythos_vllm.attention import GroupedAttention, LatentAttention
from mythos_vllm.checks import (
    Layout,
    check_latent_backend,
    check_layout,
    check_quantisation,
    dequantises,
    expansion,
)
from mythos_vllm.experts import FeedForward, LoopedExperts
from mythos_vllm.loading import PACKED, load
from mythos_vllm.row_loops import RowLoops, at_rows, running_rows

logger = init_logger(f"vllm.{__name__}")


class Layer(nn.Module):
    """A dense layer with one slot, or a looped one with a slot per loop; `index` counts through the model."""

    def __init__(
        self, config: MythosConfig, vllm_config: VllmConfig, prefix: str, slots: list[int], looped: bool, index: int
    ):
        super().__init__()
        add_norms(self, config)
        attention = LatentAttention if config.attention_type == "mla" else GroupedAttention
        self.self_attn = attention(config, vllm_config, f"{prefix}.self_attn", slots, index)
        self.looped = looped
        name, dim, hidden = f"{prefix}.mlp", config.hidden_size, config.intermediate_size
        self.mlp = LoopedExperts(config, vllm_config, name) if looped else FeedForward(vllm_config, dim, hidden, name)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], loop: int = 0, rows: Tensor | None = None) -> Tensor:
        """x [tokens, dim] -> the same; router and experts see the rows that run in this loop, None for all."""
        mix = (lambda x: at_rows(self.mlp, x, rows, loop)) if self.looped else self.mlp
        return residual(self, x, lambda x: self.self_attn(x, tables, loop), mix)


class RecurrentBlock(RowLoops):
    """The looped layers on vLLM's attention and experts; tokens of all sequences lie in one row."""

    def __init__(self, config: MythosConfig, vllm_config: VllmConfig, prefix: str):
        first, count = config.num_prelude_layers + config.num_coda_layers, config.num_recurrent_layers
        layers: list[nn.Module] = [
            Layer(
                config,
                vllm_config,
                f"{prefix}.layers.{index}",
                [first + loop * count + index for loop in range(filled(config.n_loops))],
                looped=True,
                index=config.num_prelude_layers + index,
            )
            for index in range(count)
        ]
        super().__init__(config, layers)

    def run_layers(self, x: Tensor, loop: int, context: Any) -> tuple[Tensor, list[Tensor]]:
        """The layers once, [tokens, dim]; nothing else is kept. context: the rotary tables, and each loop's rows."""
        tables, rows = context
        for layer in self.layers:
            x = layer(x, tables, loop, rows[loop])
        return x, []


class Model(nn.Module):
    """The model without its head."""

    def __init__(self, config: MythosConfig, vllm_config: VllmConfig):
        super().__init__()
        self.config = config
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, prefix="model.embed_tokens")
        self.prelude = self._dense(vllm_config, "prelude", config.num_prelude_layers, 0)
        self.prelude_norm = MythosRMSNorm(dim, eps) if config.prelude_norm else None
        self.recurrent = RecurrentBlock(config, vllm_config, "model.recurrent")
        self.coda = self._dense(vllm_config, "coda", config.num_coda_layers, config.num_prelude_layers)
        self.norm = MythosRMSNorm(dim, eps)

    def _dense(self, vllm_config: VllmConfig, name: str, count: int, first: int) -> nn.ModuleList:
        before = self.config.num_prelude_layers + self.config.num_recurrent_layers if name == "coda" else 0
        return nn.ModuleList(
            Layer(self.config, vllm_config, f"model.{name}.{i}", [first + i], looped=False, index=before + i)
            for i in range(count)
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None,
        loop_counts: Tensor | None = None,
    ) -> Tensor:
        """Tokens, positions and, where they differ, loops [tokens] -> [tokens, dim]."""
        config = self.config
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tables = rotary_tables(positions[None], config)
        for layer in self.prelude:
            x = layer(x, tables)
        e = x if self.prelude_norm is None else self.prelude_norm(x)
        rows = running_rows(loop_counts, filled(config.n_loops), len(e), e.device)
        x = self.recurrent(e, len(rows), (tables, rows)).to(e.dtype)
        for layer in self.coda:
            x = layer(x, tables)
        return self.norm(x)


class MythosForCausalLM(nn.Module):
    """What vLLM runs. Raises ValueError, before a weight is read, for what checks.py refuses."""

    packed_modules_mapping = PACKED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: MythosConfig = vllm_config.model_config.hf_config
        check(config, vllm_config)
        self.config, self.vllm_config = config, vllm_config
        self.model = Model(config, vllm_config)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        for module in self.modules():
            # As in the training model, whatever the server's type.
            if isinstance(module, (MythosRouter, MythosInjection, MythosLoopEmbedding)):
                module.float()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Rows of the embedding."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        loop_counts: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the tokens, [tokens, dim]. loop_counts [tokens], on the CPU: each token's loops, where they
        are not the server's."""
        return self.model(input_ids, positions, inputs_embeds, loop_counts)

    def get_model_state_cls(self) -> type:
        """What vLLM's second model runner keeps of the requests."""
        from .loop_state import state_class

        return state_class(self.vllm_config)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [tokens, vocab]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The tensors of an exported folder. Raises ValueError unless each is known and none is missing."""
        return load(self, self.config, weights, dequantises(self.config))


def check(config: MythosConfig, vllm_config: VllmConfig) -> None:
    """Raise ValueError for what the model cannot do here, and say what it does otherwise than one may expect."""
    quantisation, on_cpu = vllm_config.quant_config, current_platform.is_cpu()
    amx = on_cpu and torch.cpu._is_amx_tile_supported()
    if quantisation is not None:
        block = getattr(quantisation, "weight_block_size", None)
        check_quantisation(quantisation.get_name(), block, native=amx or not on_cpu)
    parallel = vllm_config.parallel_config
    layout = Layout(*(getattr(parallel, name) for name in Layout._fields))
    check_layout(config, layout, fp8=quantisation is not None)
    if config.attention_type != "mla":
        return
    if not vllm_config.model_config.use_mla:
        logger.warning(
            "No cache of latents here (%d + %d wide): keys and values of each head take %.1f times its memory",
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            expansion(config, layout.tensor_parallel_size),
        )
    elif on_cpu:
        backend = vllm_config.attention_config.backend
        check_latent_backend(None if backend is None else backend.name, amx)
