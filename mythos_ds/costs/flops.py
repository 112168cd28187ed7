"""FLOPs per token and cache bytes per token of a looped model.

Counted: matrix products (2 FLOPs per weight and token) and, apart from them, attention scores and their
product with the values at a given context, causal (half of the square). Not counted: norms, activations,
softmax, the injection, all linear in the width. A backward pass costs twice its forward (Kaplan et al. 2020,
arXiv 2001.08361).
"""

from dataclasses import dataclass

from mythos_ds.config.depth_distribution import depth_pmf, growing_mean, largest_of, mean_depth
from mythos_ds.config.rules.check import steps_of
from mythos_ds.config.schema import ModelConfig, RunConfig
from mythos_ds.costs.params import (
    attention_head_widths,
    attention_matmul,
    cache_values_per_attention,
    expert_matmul,
    shared_matmul,
)

_CURRICULUM_POINTS = 32


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs for one token, averaged over its positions.

    Attributes:
        forward: matrix products of a forward pass.
        attention: scores and values of a forward pass.
        training: forward and backward of both kinds; loops without gradient count once, all else three times.
        recompute: what activation checkpointing of the loops adds to `training`.
    """

    forward: float
    attention: float
    training: float
    recompute: float


def flops_per_token(
    model: ModelConfig,
    *,
    context: int,
    n_loops: int,
    n_grad_loops: int | None = None,
    recompute: bool = False,
) -> TokenFlops:
    """FLOPs of one token in sequences of `context` tokens at `n_loops` loops.

    Args:
        n_grad_loops: loops that carry gradient; None = all of them.
        recompute: loops with gradient are computed again in the backward pass.
    """
    grad_loops = n_loops if n_grad_loops is None else min(n_grad_loops, n_loops)
    once, once_scores = _once(model), _scores(model, context) * (model.prelude_layers + model.coda_layers)
    loop, loop_scores = _per_loop(model), _scores(model, context) * model.recurrent_layers
    with_gradient = once + once_scores + grad_loops * (loop + loop_scores)
    without = (n_loops - grad_loops) * (loop + loop_scores)
    return TokenFlops(
        forward=once + n_loops * loop,
        attention=once_scores + n_loops * loop_scores,
        training=3 * with_gradient + without,
        recompute=grad_loops * (loop + loop_scores) if recompute else 0.0,
    )


def expected_flops_per_token(config: RunConfig, mean_backprop_depth: int, grows_from: int = 1) -> TokenFlops:
    """FLOPs of one token averaged over the depth distribution, at the training sequence length; grows_from as in
    `training_depth_pmf`."""
    recompute = config.parallel.activation_checkpointing != "none"
    totals = [0.0] * 4
    for index, probability in enumerate(training_depth_pmf(config, grows_from)):
        loops = index + 1
        cost = flops_per_token(config.model, context=config.training.seq_len, n_loops=loops,
                               n_grad_loops=mean_backprop_depth, recompute=recompute)  # fmt: skip
        values = (cost.forward, cost.attention, cost.training, cost.recompute)
        totals = [total + probability * value for total, value in zip(totals, values, strict=True)]
    return TokenFlops(*totals)


def training_depth_pmf(config: RunConfig, grows_from: int = 1) -> tuple[float, ...]:
    """P(L = 1 .. max_loops) of the loops that a training step runs, over the whole run or training stage: those of its
    longest sequence where each has a depth of its own, and with the steps of a curriculum in their share. grows_from:
    the mean that the curriculum begins with."""
    model, training = config.model, config.training
    steps = steps_of(training)
    growing = min(training.depth_curriculum_steps, steps)
    # The mean at evenly spaced steps of its growth, and the final one.
    weights = {growing_mean(steps, model.mean_recurrence, growing): 1.0 - (growing / steps if growing else 0.0)}
    points = min(_CURRICULUM_POINTS, growing)
    for point in range(points):
        step = (2 * point + 1) * growing // (2 * points)
        mean = growing_mean(step, model.mean_recurrence, training.depth_curriculum_steps, grows_from)
        weights[mean] = weights.get(mean, 0.0) + growing / steps / points
    total = [0.0] * model.max_loops
    for mean, weight in weights.items():
        pmf = depth_pmf(training.depth_distribution, mean, training.depth_sigma, model.max_loops)
        if training.depth_per == "sequence":
            pmf = largest_of(pmf, training.global_batch_size)
        total = [before + weight * probability for before, probability in zip(total, pmf, strict=True)]
    return tuple(total)


def mean_training_depth(config: RunConfig, grows_from: int = 1) -> float:
    """Expected loop count that a training step runs; grows_from as in `training_depth_pmf`."""
    return mean_depth(training_depth_pmf(config, grows_from))


def cache_bytes_per_token(model: ModelConfig, n_loops: int, bytes_per_value: int = 2) -> int:
    """Bytes one token leaves in an exact cache, with one entry per (loop, layer); bfloat16 unless said."""
    attentions = model.prelude_layers + model.coda_layers + n_loops * model.recurrent_layers
    return attentions * cache_values_per_attention(model) * bytes_per_value


def dense_layer_flops(model: ModelConfig, context: int) -> float:
    """Forward FLOPs of one token in one prelude or coda layer: matrices and attention, at `context` tokens."""
    return _dense_layer(model) + _scores(model, context)


def recurrent_layer_flops(model: ModelConfig, context: int) -> float:
    """Forward FLOPs of one token in one recurrent layer, once: matrices and attention, at `context` tokens."""
    return _recurrent_layer(model) + _scores(model, context)


def expert_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one token in the experts that it chooses in one recurrent layer."""
    return 2.0 * model.n_experts_per_tok * expert_matmul(model)


def lora_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one token in one loop's LoRA."""
    return 2.0 * 2 * model.lora_rank * model.dim


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one token in the LM head."""
    return 2.0 * model.vocab_size * model.dim


def _once(model: ModelConfig) -> float:
    """Matrix FLOPs outside the loop: prelude, coda, LM head. The embedding is a look-up."""
    return (model.prelude_layers + model.coda_layers) * _dense_layer(model) + head_flops(model)


def _per_loop(model: ModelConfig) -> float:
    """Matrix FLOPs of one loop: its layers and the LoRA."""
    return model.recurrent_layers * _recurrent_layer(model) + lora_flops(model)


def _dense_layer(model: ModelConfig) -> float:
    return 2.0 * (attention_matmul(model) + 3 * model.dim * model.ffn_dim)


def _recurrent_layer(model: ModelConfig) -> float:
    """Attention, router, chosen and shared experts."""
    beside = attention_matmul(model) + model.n_experts * model.dim + shared_matmul(model)
    return 2.0 * beside + expert_flops(model)


def _scores(model: ModelConfig, context: int) -> float:
    """Score and value FLOPs of one attention, mean over the positions of a causal sequence."""
    key_width, value_width = attention_head_widths(model)
    return 2.0 * model.n_heads * (key_width + value_width) * (context + 1) / 2
