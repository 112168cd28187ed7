"""A dense model of each family: cut, trained for three steps with experts on two processes under ZeRO-3, merged,
exported, and run by transformers with the same logits and tokens."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mythos_ds
from mythos_ds.weights.model_folder import load_model
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import environment, metrics, run_pretrain, small_data
from tests.parity.test_hf_families import CUT, FAMILIES, make_source

transformers = pytest.importorskip("transformers")
import mythos_hf

STEPS = 3
DEFAULT = ["olmo2 with biases"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Overrides by key."""
    return dict(line.split("=", 1) for line in small_data(tmp_path_factory.mktemp("data")))


def write_run(file: Path, folder: Path, data: dict[str, str]) -> None:
    """A run of the model in `folder`, from its weights."""
    training = {
        "seq_len": 32, "micro_batch_size": 2, "global_batch_size": 8, "max_steps": STEPS, "dtype": "float32",
        "lr": 0.01, "depth_distribution": "poisson", "eval_interval": 0, "eval_batches": 1, "init_from": str(folder),
    }  # fmt: skip
    content = {
        "parallel": {"ep_size": 2, "zero_stage": 3},
        "training": training,
        "data": {
            "datasets": json.loads(data["data.datasets"]),
            "tokenizer": data["data.tokenizer"],
            "data_dir": data["data.data_dir"],
        },
        "checkpoint": {"interval": 0},
        "monitor": {"log_interval": 1, "tensorboard": False},
    }
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_cut_trained_exported_and_run(name: str, tmp_path: Path, data: dict[str, str]) -> None:
    kind, options = FAMILIES[name]
    make_source(tmp_path / "source", kind, {**options, "vocab_size": int(data["model.vocab_size"])})
    mythos_ds.convert(tmp_path / "source", tmp_path / "cut", from_format="hf", to_format="mythos", **CUT)
    write_run(tmp_path / "run.json", tmp_path / "cut", data)
    command = ["--config", str(tmp_path / "run.json"), "--run-dir", str(tmp_path / "run")]
    run_pretrain(command, nprocs=2, folder=tmp_path / "logs").check()
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))

    merge = [sys.executable, "-m", "mythos_ds", "merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]
    subprocess.run(merge, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=120)
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("cut", "merged"))
    assert set(before) == set(after)
    still = [key for key in before if torch.equal(before[key], after[key]) and "router" not in key]
    assert still == [], "every weight was trained"

    ours = load_model(tmp_path / "merged")
    mythos_ds.convert(tmp_path / "merged", tmp_path / "hf", dtype="float32")
    theirs = mythos_hf.MythosForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, 97, (1, 48), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        for loops in (1, 4):
            logits = ours(tokens, n_loops=loops)
            assert (theirs(tokens, n_loops=loops).logits - logits).abs().max() <= 2e-5 * logits.abs().max(), loops
            made = tokens[:, :8]
            settings = {"max_new_tokens": 12, "do_sample": False, "n_loops": loops, "eos_token_id": None}
            generated = theirs.generate(made, **settings)
            for _ in range(12):
                made = torch.cat([made, ours(made, n_loops=loops)[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(generated, made), loops
