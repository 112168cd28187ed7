"""A file of three training stages at toy size: pre-training, longer sequences with YaRN and other data, annealing."""

import copy
import json
from pathlib import Path
from typing import Any

from mythos_ds.config.loader import load_config
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

STEPS = 11
"""Of all stages: 4, 4 and 3."""


def three_stages(folder: Path, **training: Any) -> Path:
    """The path of the file, beside its data; training: settings of all stages."""
    tokenizer = make_tokenizer(folder)
    for seed, name in enumerate(("first", "second")):
        make_dataset(folder / name, tokenizer, make_texts(200, seed=seed))
    content: dict[str, Any] = {
        "model": {
            "vocab_size": tokenizer.vocab_size, "dim": 32, "prelude_layers": 1, "recurrent_layers": 1, "coda_layers": 1,
            "max_loops": 6, "mean_recurrence": 2, "attn_type": "gqa", "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48,
            "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 16,
        },
        "parallel": {"zero_stage": 3},
        "training": {
            "seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8, "max_steps": 4, "warmup_steps": 2,
            "lr": 0.02, "dtype": "float32", "eval_interval": 0, "eval_batches": 1, "decay_fraction": 0.0, **training,
        },
        "data": {
            "datasets": [{"prefix": str(folder / "first")}], "tokenizer": str(tokenizer.path), "split": [90, 10, 0],
            "data_dir": str(folder),
        },
        "checkpoint": {"interval": 2, "keep": 9},
        "monitor": {"log_interval": 1, "tensorboard": False, "sample_tokens": 2},
        "stages": [
            {"name": "base"},
            {
                "name": "long",
                "model": {
                    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
                    "mean_recurrence": 3,
                },
                "training": {
                    "seq_len": 64, "micro_batch_size": 1, "max_steps": 4, "lr": 0.01, "depth_per": "sequence",
                    "global_batch_ramp": {"start": 4, "increment": 2, "samples": 12},
                },
                "data": {"datasets": [{"prefix": str(folder / "second")}]},
            },
            {
                "name": "anneal",
                "training": {"max_tokens": 3 * 6 * 64, "global_batch_size": 6, "schedule": "cosine", "warmup_steps": 0,
                             "decay_fraction": None},
                "data": {
                    "datasets": [
                        {"prefix": str(folder / "first"), "weight": 1.0},
                        {"prefix": str(folder / "second"), "weight": 3.0},
                    ]
                },
            },
        ],
    }  # fmt: skip
    return written(folder / "stages.json", content)


def written(path: Path, content: dict[str, Any]) -> Path:
    """A file of a configuration."""
    path.write_text(json.dumps(content, indent=1))
    load_config(str(path))
    return path


def changed(path: Path, name: str, change: Any) -> Path:
    """Another file beside `path`, after `change` was done to its content."""
    content = copy.deepcopy(json.loads(path.read_text()))
    change(content)
    return written(path.with_name(f"{name}.json"), content)
