"""The golden runs: 20 steps of tiny and of each preset's proxy in fp32, on two processes, on committed tokens."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.schema import RunConfig
from tests.golden.tokens import TOKENIZER, TOKENS
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import metrics, run_pretrain

LOSSES = ROOT / "tests" / "golden" / "losses.json"
STEPS = 20
PROCESSES = 2
RECORDED = ("loss", "grad_norm")
OTHERS = "other_processors"
"""Of the file: runs by the rounding of other machines than the one that recorded first; see `rounding`."""
_COMMON: dict[str, dict[str, Any]] = {
    "training": {
        "dtype": "float32", "grad_dtype": "float32", "max_steps": STEPS, "warmup_steps": 2,
        "eval_interval": 0, "eval_batches": 1,
        "decay_fraction": 0.2,  # of presets with training stages the last one decays
    },
    "checkpoint": {"interval": 0},
    "monitor": {"log_interval": 1, "tensorboard": False, "sample_prompts": [], "sample_tokens": 1},
}  # fmt: skip
_FEW_LOOPS = {"mean_recurrence": 2, "max_loops": 8}
"""Of proxies: a step of 1t's at its own depths takes seconds."""
TINY = "tiny"


def rounding() -> str:
    """Names how this machine rounds: libraries of matrix products add in an order that depends on the processor. A
    digest of the bits of products, sums and exponentials in fp32 on one thread, none of them this project's code."""
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bits = hashlib.sha256()
        for rows, inner, columns in ((512, 128, 384), (96, 384, 128), (7, 64, 32), (1024, 128, 4096)):
            x = torch.randn(rows, inner, generator=generator)
            y = torch.nn.functional.linear(x, torch.randn(columns, inner, generator=generator))
            for made in (y, y.softmax(-1), y.pow(2).mean(-1).rsqrt(), y.sum(0)):
                bits.update(made.numpy().tobytes())
        return bits.hexdigest()[:12]
    finally:
        torch.set_num_threads(threads)


def names() -> list[str]:
    """Presets that have a golden run."""
    return sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json") if path.name != "schema.json")


def record(preset: str, folder: Path) -> dict[str, list[float]]:
    """Train and return what is recorded of each step, by metric."""
    config = folder / f"{preset}.json"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(settings(preset, folder)))
    arguments = ["--config", str(config), "--run-dir", str(folder / "run")]
    run_pretrain(arguments, nprocs=PROCESSES, folder=folder, timeout_s=500).check()
    steps = [line for line in metrics(folder / "run") if RECORDED[0] in line]
    assert len(steps) == STEPS, f"{preset}: {len(steps)} steps"
    return {name: [step[name] for step in steps] for name in RECORDED}


def settings(preset: str, folder: Path) -> dict[str, Any]:
    """The run as JSON values; `folder` takes the index of the samples."""
    config = load_config(preset).config
    changes = {**_COMMON}
    if preset != TINY:
        config, _ = make_proxy(config, PROCESSES)
        changes["model"] = _FEW_LOOPS
    sections: dict[str, Any] = config.model_dump(exclude_unset=True, mode="json")
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    sections["data"] = {
        "datasets": [{"prefix": str(TOKENS)}],
        "tokenizer": str(TOKENIZER),
        "split": [98.0, 2.0, 0.0],
        "data_dir": str(folder / "data"),
        "document_mask": config.data.document_mask,
    }
    return RunConfig.model_validate(sections).model_dump(exclude_unset=True, mode="json")


def digest(runs: dict[str, dict[str, list[float]]]) -> str:
    """What names recorded numbers in the changelog."""
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()[:12]
