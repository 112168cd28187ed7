"""The settings with which a dense model becomes a looped one whose loops help, measured on SmolLM2-135M.

The cut keeps every layer, the one that makes the attention sink in the prelude; A starts at 0.05; embedding, head and
prelude stay what they are; the block, the coda and the final norm are trained for a short while at low rates.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.attention_sink import Sink
from mythos_ds.conversion.dense_source import source_problems
from mythos_ds.conversion.retrofit import Cut
from mythos_ds.errors import Coded, ConfigError
from mythos_ds.io import read_json
from mythos_ds.weights.model_folder import CONFIG

PRELUDE_SHARE = 0.4
CODA_SHARE = 4 / 9
"""Of the layers after the prelude."""
_RECIPE = Cut(
    prelude=1, recurrent=1, coda=0, n_experts=1, granularity=1, experts_per_token=1, mean_recurrence=2, max_loops=6
)
_TRAINING: dict[str, Any] = {
    "training.seq_len": 256,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 2,
    "training.max_steps": 72,
    "training.optimizer": "adamw",
    "training.lr": 1e-4,
    "training.injection_lr": 1e-3,
    "training.beta1": 0.9,
    "training.beta2": 0.95,
    "training.weight_decay": 0.0,
    "training.grad_clip": 1.0,
    "training.schedule": "wsd",
    "training.warmup_steps": 8,
    "training.decay_fraction": 0.3,
    "training.min_lr_ratio": 0.05,
    "training.depth_distribution": "poisson",
    "training.depth_per": "step",
    "training.depth_curriculum_steps": 0,
    "training.mean_backprop_depth": 2,
    "training.balance_loss": 0.0,
    "training.z_loss": 0.0,
    "training.router_bias_rate": 0.0,
}


def dense_config(folder: Path) -> dict[str, Any]:
    """config.json of a dense model that can be cut. Raises ConfigError, with every reason, for one that cannot."""
    hf = read_json(folder / CONFIG)
    problems = source_problems(hf) if isinstance(hf, dict) else ["not a JSON object"]
    if not problems and hf["num_hidden_layers"] < 2:
        problems = [f"num_hidden_layers: given {hf['num_hidden_layers']}; allowed: at least 2, for prelude and block"]
    if problems:
        raise ConfigError([Coded("MDS170", f"{folder / CONFIG}: {problem}") for problem in problems])
    return dict(hf)


def choose_cut(n_layers: int, sink: Sink) -> dict[str, int]:
    """Layers of prelude, recurrent block and coda, by name: 0.4 of all and at least up to the sink's layer; of the rest
    4/9 are the coda's. 30 layers become 12 + 10 + 8."""
    least = 1 if sink.layer is None else sink.layer + 1
    prelude = min(max(round(PRELUDE_SHARE * n_layers), least), n_layers - 1)
    rest = n_layers - prelude
    coda = round(CODA_SHARE * rest)
    return {"prelude": prelude, "recurrent": rest - coda, "coda": coda}


def recipe_cut(given: Mapping[str, int | float], chosen: Mapping[str, int]) -> dict[str, int | float]:
    """Every value of the cut by its name in CUT_FLAGS: those that are given, else those of the recipe."""
    own = replace(_RECIPE, **chosen)
    values: dict[str, int | float] = {
        **chosen,
        "experts": own.n_experts,
        "granularity": own.granularity,
        "experts_per_token": own.experts_per_token,
        "mean_recurrence": own.mean_recurrence,
        "max_loops": own.max_loops,
        "decay": own.decay,
    }
    return {**values, **given}


def frozen(model: ModelConfig, *others: str) -> list[str]:
    """Name patterns of the embedding, of the head where it is not the embedding, and of other parts."""
    return ["embed.*", *([] if model.tie_embeddings else ["lm_head.*"]), *others]


def recipe_overrides(model: ModelConfig) -> list[str]:
    """How such a model is trained, as `section.key=value`."""
    # Matrices train at lr * lr_reference_dim / dim; lr is meant as it is.
    own = {"training.lr_reference_dim": model.dim, "training.frozen": frozen(model, "prelude.*")}
    settings = {**_TRAINING, **own, "data.document_mask": False}
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
