"""The looped model on vLLM: the modules of the Hugging Face export around vLLM's attention, cache and experts.

Each (loop, layer) has an Attention of its own, because vLLM keeps one cache per Attention: loops that shared one would
overwrite each other's keys. The loop count is the configuration's, which `--hf-overrides '{"n_loops": 8}'` changes for
a server; requests may ask for fewer (request_loops.py).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mythos_hf.attention_mythos import MythosAttention, MythosRMSNorm
from mythos_hf.configuration_mythos import MythosConfig, filled
from mythos_hf.experts_mythos import MythosMLP, MythosRouter
from mythos_hf.recurrent_mythos import MythosInjection, MythosLoopEmbedding, add_norms, residual
from mythos_hf.rotary_mythos import rotary_tables

from .row_loops import RowLoops, at_rows, running_rows

_EXPERT_PARTS = ("gate", "up", "down")


def routed(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """What the router decided, unpacked from where vLLM expects logits (see LoopedExperts)."""
    return gating_output[:, :topk].contiguous(), gating_output[:, topk : 2 * topk].to(torch.int32)


class LoopedAttention(MythosAttention):
    """Attention of one layer, with a cache for each loop it runs in."""

    def __init__(self, config: MythosConfig, vllm_config: VllmConfig, prefix: str, slots: list[int], index: int):
        super().__init__(config, index)
        above = prefix.rsplit("model.", 1)[0]
        self.attn = nn.ModuleList(
            Attention(
                config.num_attention_heads,
                self.head_dim,
                self.scaling,
                num_kv_heads=config.num_key_value_heads,
                cache_config=vllm_config.cache_config,
                quant_config=None,
                prefix=f"{above}model.layers.{slot}.self_attn.attn",
            )
            for slot in slots
        )

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], loop: int = 0) -> Tensor:  # type: ignore[override]
        """x [tokens, dim] -> the same."""
        q, k, v = self._latent(x[None], tables) if self.latent else self._grouped(x[None], tables)
        out = self.attn[loop](q[0].flatten(1), k[0].flatten(1), v[0].flatten(1))
        if self.latent:
            out = out.unflatten(-1, (-1, self.head_dim))[..., : self.value].flatten(1)
        return self.o_proj(out)


class LoopedExperts(nn.Module):
    """Router, routed and shared experts.

    The router's biases differ by loop, which vLLM's own cannot express: it decides here, and its weights and choices
    travel to the fused experts in the columns where logits would be.
    """

    def __init__(self, config: MythosConfig, prefix: str):
        super().__init__()
        self.columns, self.k = config.n_routed_experts, config.num_experts_per_tok
        if 2 * self.k > self.columns:
            raise ValueError(f"num_experts_per_tok: given {self.k}; allowed: at most half of {self.columns} experts")
        self.router = MythosRouter(config)
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=self.k,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=False,
            custom_routing_function=routed,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * filled(config.shared_expert_intermediate_size)
            self.shared_experts = MythosMLP(config.hidden_size, width)

    def forward(self, x: Tensor, loop: int) -> Tensor:
        """x [tokens, dim] -> the same."""
        indices, weights = self.router(x, loop)
        packed = weights.new_zeros(len(x), self.columns)
        packed[:, : self.k], packed[:, self.k : 2 * self.k] = weights, indices.to(weights.dtype)
        out = self.experts(x, packed)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class Layer(nn.Module):
    """A dense layer with one slot, or a looped one with a slot per loop; `index` counts through the model."""

    def __init__(
        self, config: MythosConfig, vllm_config: VllmConfig, prefix: str, slots: list[int], looped: bool, index: int
    ):
        super().__init__()
        add_norms(self, config)
        self.self_attn = LoopedAttention(config, vllm_config, prefix, slots, index)
        self.looped = looped
        dim, hidden = config.hidden_size, config.intermediate_size
        self.mlp = LoopedExperts(config, f"{prefix}.mlp") if looped else MythosMLP(dim, hidden)

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
    """What vLLM runs. Raises ValueError at start for what it cannot: tensor, pipeline or expert parallelism."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: MythosConfig = vllm_config.model_config.hf_config
        parallel = vllm_config.parallel_config
        sizes = {name: getattr(parallel, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
        if wrong := {name: size for name, size in sizes.items() if size > 1}:
            raise ValueError(f"{wrong}: the looped model runs on one device here; allowed: 1 (data parallelism works)")
        if vllm_config.quant_config is not None:
            raise ValueError("quantization: the looped model runs in float32 and bfloat16 here; export without fp8")
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
        # Attention keeps scales of its own, and experts load themselves.
        places = {
            name: tensor
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if ".self_attn.attn." not in name and ".mlp.experts." not in name
        }
        experts: dict[str, list[tuple[str, Tensor]]] = {}
        loaded: set[str] = set()
        for name, value in weights:
            stack, mark, rest = name.partition(".mlp.experts.")
            if mark:
                experts.setdefault(f"{stack}.mlp.experts", []).append((rest, value))
                continue
            if name not in places:
                raise ValueError(f"{name}: not a tensor of this model")
            place = places[name]
            getattr(place, "weight_loader", default_weight_loader)(place, value)
            loaded.add(name)
        parts = [f"{e}.{part}_proj.weight" for e in range(self.config.n_routed_experts) for part in _EXPERT_PARTS]
        for layer in range(self.config.num_recurrent_layers):
            stack = f"model.recurrent.layers.{layer}.mlp.experts"
            if odd := set(parts).symmetric_difference(rest for rest, _ in experts.get(stack, [])):
                raise ValueError(f"{stack}.{min(odd)}: not in the folder, or not in the model ({len(odd)} such)")
        for name, own in experts.items():
            stack_of_experts: Any = self.get_submodule(name)
            found = set(stack_of_experts.load_weights(own))
            loaded |= {f"{name}.{part}" for part in found}
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        if missing := sorted(set(places) - loaded - tied):
            raise ValueError(f"{missing[0]}: not in the folder ({len(missing)} tensors are missing)")
        return loaded | {name for name, _ in self.named_parameters() if ".mlp.experts." in name}
