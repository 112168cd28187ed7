"""The looped model beside models without a loop: at equal training FLOPs, and at equal serving latency.

All three have its width, attention and vocabulary. The dense one stacks distinct layers of the prelude's kind, the
plain mixture distinct layers of the recurrent kind. Latency is taken to go with the forward FLOPs of a token; the
looped model is served at full depth.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.flops import (
    cache_bytes_per_token,
    dense_layer_flops,
    expected_flops_per_token,
    flops_per_token,
    head_flops,
    recurrent_layer_flops,
)
from mythos_ds.costs.params import attention_matmul, count_parameters, expert_matmul, shared_matmul


def comparison(resolved: ResolvedRun) -> list[dict[str, Any]]:
    """Rows: the looped model at mean and at full depth, and both others at equal training FLOPs and equal latency."""
    config, model = resolved.config, resolved.config.model
    context = config.training.seq_len
    training = expected_flops_per_token(config, resolved.mean_backprop_depth, resolved.grows_from).training
    total, active = count_parameters(model).total, count_parameters(model).active
    full = flops_per_token(model, context=context, n_loops=model.max_loops)
    rows = [
        _row(f"looped, {loops} loops", total, active, training, model, loops, context)
        for loops in (model.mean_recurrence, model.max_loops)
    ]
    kinds = (("dense", dense_layer_flops(model, context)), ("mixture", recurrent_layer_flops(model, context)))
    for kind, layer in kinds:
        budgets = (
            ("equal training FLOPs", (training / 3 - head_flops(model)) / layer),
            ("equal serving latency at full depth", (full.forward + full.attention - head_flops(model)) / layer),
        )
        for name, layers in budgets:
            rows.append(_stack(f"{kind}, {name}", kind, max(1, round(layers)), layer, model))
    return rows


def _row(
    name: str, total: float, active: float, training: float, model: ModelConfig, loops: int, context: int
) -> dict[str, Any]:
    forward = flops_per_token(model, context=context, n_loops=loops)
    return {
        "model": name,
        "layers_run": model.prelude_layers + model.coda_layers + loops * model.recurrent_layers,
        "parameters": total,
        "active_parameters": active,
        "training_flops_per_token": training,
        "serving_flops_per_token": forward.forward + forward.attention,
        "cache_bytes_per_token": cache_bytes_per_token(model, loops),
    }


def _stack(name: str, kind: str, layers: int, layer_flops: float, model: ModelConfig) -> dict[str, Any]:
    """A model of distinct layers of one kind."""
    attention = attention_matmul(model)
    ends = (1 if model.tie_embeddings else 2) * model.vocab_size * model.dim
    if kind == "dense":
        held = used = attention + 3 * model.dim * model.ffn_dim
    else:
        outside = attention + shared_matmul(model) + model.n_experts * model.dim
        held = outside + model.n_experts * expert_matmul(model)
        used = outside + model.n_experts_per_tok * expert_matmul(model)
    forward = layers * layer_flops + head_flops(model)
    alone = model.model_copy(update={"prelude_layers": layers, "coda_layers": 0, "recurrent_layers": 0})
    return {
        "model": name,
        "layers_run": layers,
        "parameters": layers * held + ends,
        "active_parameters": layers * used + model.vocab_size * model.dim,
        "training_flops_per_token": 3 * forward,
        "serving_flops_per_token": forward,
        "cache_bytes_per_token": cache_bytes_per_token(alone, 0),
    }


def print_comparison(console: Console, rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    made = Table(title="Beside models without a loop", title_justify="left")
    headings = ("model", "layers run", "parameters", "active", "GFLOP trained", "GFLOP served", "cache per token")
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(
            row["model"],
            f"{row['layers_run']:,}",
            f"{row['parameters'] / 1e9:,.1f}G",
            f"{row['active_parameters'] / 1e9:,.1f}G",
            f"{row['training_flops_per_token'] / 1e9:,.0f}",
            f"{row['serving_flops_per_token'] / 1e9:,.0f}",
            f"{row['cache_bytes_per_token'] / 1e3:,.0f} kB",
        )
    console.print(made)
