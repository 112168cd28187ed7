"""What one run of a study is: a configuration, a variant of the block, and the task. No torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mythos_ds.config.loader import load_config

FORMAT = 1
BASE = "tiny"
"""The preset that every study starts from."""


@dataclass(frozen=True)
class Arm:
    """One line of a study's table: overrides (`section.key`) of the study's base, and a variant of the block by its
    name in variants.py."""

    name: str
    label: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    control: str | None = None


@dataclass(frozen=True)
class RunSpec:
    """One training run: all that its result depends on, in JSON values.

    Attributes:
        config: a configuration, as a file has it, without what equals the defaults.
        chains: the task whose samples are made; None for text.
        loops: loop counts at which the trained model is evaluated.
    """

    config: dict[str, Any]
    control: str | None
    chains: dict[str, Any] | None
    loops: tuple[int, ...]

    @property
    def worker(self) -> str:
        """The module that runs it; a task may name its own."""
        return (self.chains or {}).get("worker", "mythos_ds.lab.worker")

    @property
    def key(self) -> str:
        """Names the run; the same for the same content. Where the data lie does not count."""
        content = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        content["config"]["data"].pop("data_dir", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunSpec":
        """The run that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "loops": tuple(values["loops"])})


_ALONE = {
    "parallel.ep_size": 1,
    "parallel.zero_stage": 0,
    "parallel.activation_checkpointing": "none",
    "training.eval_interval": 0,
    "checkpoint.interval": 0,
    "monitor.tensorboard": False,
    "monitor.sample_prompts": [],
    "monitor.sample_tokens": 1,
}
"""A run on one process, which evaluates and saves at its end only."""


def make_spec(
    base: Mapping[str, Any],
    arm: Arm,
    seed: int,
    *,
    loops: tuple[int, ...],
    data_dir: str,
    chains: dict[str, Any] | None = None,
) -> RunSpec:
    """The run of `arm` with `seed`. Raises ConfigError where the overrides do not make a configuration."""
    overrides = {**_ALONE, **base, **arm.overrides, "training.seed": seed, "data.data_dir": data_dir}
    if chains is not None:
        # The samples are made, not read; the section must only be a valid one.
        overrides |= {"data.datasets": [{"prefix": "permutation-chains"}], "data.tokenizer": "none"}
        overrides["model.vocab_size"] = chains["entities"] + chains["relations"]
    config = load_config(BASE, [f"{key}={json.dumps(value)}" for key, value in overrides.items()]).config
    raw = config.model_dump(mode="json", exclude={"deepspeed", "cluster"}, exclude_defaults=True)
    return RunSpec(raw, arm.control, chains, loops)
