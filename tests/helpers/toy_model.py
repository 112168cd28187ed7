"""Small models whose every weight matters, for tests that compare gradients or formats."""

from typing import Any

import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.mythos import MythosModel

MLA: dict[str, Any] = {
    "attn_type": "mla",
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
GQA: dict[str, Any] = {"attn_type": "gqa", "n_kv_heads": 2, "head_dim": 8}


def gradient(tensor: Tensor) -> Tensor:
    """The gradient of a tensor that has one."""
    assert tensor.grad is not None
    return tensor.grad


def toy_config(**changes: Any) -> ModelConfig:
    """A GQA model of width 32 with two recurrent layers and eight experts, unless changed."""
    values: dict[str, Any] = {
        "vocab_size": 40,
        "dim": 32,
        "prelude_layers": 1,
        "recurrent_layers": 2,
        "coda_layers": 1,
        "max_loops": 6,
        "mean_recurrence": 3,
        "n_heads": 4,
        "ffn_dim": 48,
        "n_experts": 8,
        "n_experts_per_tok": 2,
        "expert_dim": 12,
        "n_shared_experts": 1,
        "lora_rank": 4,
    }
    attention = {} if "attn_type" in changes else GQA
    return ModelConfig(**{**values, **attention, **changes})


def toy_model(**changes: Any) -> ModelConfig:
    """A model with every part that training touches, small enough for seconds."""
    values: dict[str, Any] = {
        "vocab_size": 64,
        "dim": 32,
        "prelude_layers": 1,
        "recurrent_layers": 2,
        "coda_layers": 1,
        "max_loops": 16,
        "mean_recurrence": 4,
        "attn_type": "mla",
        "n_heads": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "ffn_dim": 64,
        "n_experts": 8,
        "n_experts_per_tok": 2,
        "expert_dim": 16,
        "n_shared_experts": 1,
        "lora_rank": 4,
    }
    return ModelConfig(**{**values, **changes})


def randomise(model: MythosModel, seed: int = 0) -> MythosModel:
    """Moves every weight and router buffer away from its first value: zero matrices would hide wrong gradients."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(noise(parameter, 0.4 if parameter.dim() == 1 else 0.15))
            elif parameter.dim() == 1 or (parameter == 1).all():
                parameter.add_(noise(parameter, 0.2))
        for layer in model.moe_layers():
            router = layer.router
            router.bias.copy_(noise(router.bias, 0.1))
            router.loop_bias.copy_(noise(router.loop_bias, 0.1))
            router.loop_updates[:3] = torch.tensor([500.0, 100.0, 99.0])
    return model


def toy_batch(config: ModelConfig, batch: int = 3, seq: int = 20, seed: int = 1) -> dict[str, Tensor]:
    """Tokens, targets and positions of several documents per sequence, int64 [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, config.vocab_size, (batch, seq + 1), generator=generator)
    positions = torch.arange(seq).repeat(batch, 1)
    positions[0, 7:] -= 7
    positions[0, 15:] -= 8
    positions[1, 1:] -= 1
    positions[2] += 3  # starts inside a document
    positions[2, 12:] -= 15
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "positions": positions}
