"""Exact parameter counts from a configuration; a test holds them against the module on the meta device."""

from dataclasses import dataclass

from mythos_ds.config.attention_shapes import attention_matmul, mla_widths
from mythos_ds.config.schema import ModelConfig, RunConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. The parts are disjoint and sum to `total`.

    Attributes:
        embedding: rows of the embedding table.
        head: the LM head; 0 when tied to the embedding.
        dense: prelude and coda blocks.
        attention: attention of the recurrent layers, with its own norms and biases.
        router: routers of the recurrent layers.
        routed: all routed experts.
        shared: all shared experts.
        other: norms outside attention, injection, loop embedding, LoRA, halting.
        active: unique parameters one token uses, however often: all but the experts it is not routed to and the rows
            of an untied embedding it does not read.
    """

    embedding: int
    head: int
    dense: int
    attention: int
    router: int
    routed: int
    shared: int
    other: int
    active: int

    @property
    def total(self) -> int:
        """All parameters of the model."""
        parts = (self.embedding, self.head, self.dense, self.attention, self.router, self.routed, self.shared)
        return sum(parts) + self.other

    @property
    def active_share(self) -> float:
        """active / total."""
        return self.active / self.total


_MOMENT_BYTES = {"adamw": 8, "muon": 8, "sgd": 0}


def checkpoint_disk_bytes(config: RunConfig) -> int:
    """Bytes of a training checkpoint: fp32 weights and moments (of Muon at most), and below ZeRO-3 the weights as
    trained beside them."""
    training = config.training
    weight = 0 if config.parallel.zero_stage == 3 else 2 if training.dtype == "bfloat16" else 4
    return count_parameters(config.model).total * (4 + _MOMENT_BYTES[training.optimizer] + weight)


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts every weight, norm and gain of the model."""
    layers, dim = model.recurrent_layers, model.dim
    attention = attention_matmul(model) + _attention_vectors(model)
    dense_block = attention + 3 * dim * model.ffn_dim + 2 * dim
    embedding = model.vocab_size * dim
    counts = {
        "embedding": embedding,
        "head": 0 if model.tie_embeddings else embedding,
        "dense": (model.prelude_layers + model.coda_layers) * dense_block,
        "attention": layers * attention,
        "router": layers * model.n_experts * dim,
        "routed": layers * model.n_experts * expert_matmul(model),
        "shared": layers * shared_matmul(model),
        "other": _other(model),
    }
    idle_experts = layers * (model.n_experts - model.n_experts_per_tok) * expert_matmul(model)
    idle_rows = 0 if model.tie_embeddings else embedding - dim
    return ParameterCounts(**counts, active=sum(counts.values()) - idle_experts - idle_rows)


def attention_head_widths(model: ModelConfig) -> tuple[int, int]:
    """Widths of a query/key head and of a value head."""
    if model.attn_type == "gqa":
        return model.resolved_head_dim, model.resolved_head_dim
    _, nope, rope, value = mla_widths(model)
    return nope + rope, value


def cache_values_per_attention(model: ModelConfig) -> int:
    """Numbers one token leaves in the cache of one attention: MLA's latent and rope key, or GQA's K and V."""
    if model.attn_type == "gqa":
        return 2 * model.resolved_kv_heads * model.resolved_head_dim
    kv_lora, _, rope, _ = mla_widths(model)
    return kv_lora + rope


def expert_matmul(model: ModelConfig) -> int:
    """Matrix elements of one routed expert (SwiGLU)."""
    return 3 * model.dim * model.expert_dim


def shared_matmul(model: ModelConfig) -> int:
    """Matrix elements of the shared experts of one layer."""
    return 3 * model.dim * model.n_shared_experts * model.resolved_shared_dim


def _attention_vectors(model: ModelConfig) -> int:
    """Norms and biases of one attention."""
    if model.attn_type == "mla":
        return (model.q_lora_rank or 0) + (model.kv_lora_rank or 0)
    width, heads, kv_heads = model.resolved_head_dim, model.n_heads, model.resolved_kv_heads
    normed = heads + kv_heads if model.qk_norm_span == "all" else 2
    biases = {"none": 0, "qkv": width * (heads + 2 * kv_heads), "all": width * (heads + 2 * kv_heads) + model.dim}
    return (normed * width if model.qk_norm else 0) + biases[model.attention_biases]


def _other(model: ModelConfig) -> int:
    dim = model.dim
    time_step = 1 if model.discretisation == "direct" else dim
    block_norms = 2 * dim * model.recurrent_layers
    injection = 2 * dim + time_step
    loop_gain = dim if model.loop_embedding == "scaled" else 0
    lora = model.lora_rank * (2 * dim + model.max_loops)
    state_norm = dim if model.injection == "post" else 0
    halting = dim + 1 if model.halting != "none" else 0
    prelude_norm = dim if model.prelude_norm else 0
    return block_norms + injection + loop_gain + lora + state_norm + halting + prelude_norm + dim
