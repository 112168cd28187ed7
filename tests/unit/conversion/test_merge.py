"""The tools on checkpoints as files: merging, resharding, inspecting; memory at two gigabytes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mythos_ds.checkpoint.deepspeed_format import WEIGHTS
from mythos_ds.checkpoint.portable import open_state
from mythos_ds.checkpoint.training_state import TrainingState
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.conversion.hf_card import model_card
from mythos_ds.conversion.merge import chat_of, metadata_of, newest_tag, tokenizer_of
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import CheckpointError
from mythos_ds.weights.model_folder import load_model, read_metadata
from mythos_ds.weights.reader import TensorFolder
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_checkpoint import write_synthetic

LIMIT_BYTES = 500_000_000


def run_of(world_size: int, *overrides: str) -> ResolvedRun:
    return resolve(load_config("tiny", list(overrides)).config, world_size)


def start(tool: str, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    resolved = run_of(4, "parallel.ep_size=2", "model.recurrent_layers=2", "training.micro_batch_size=1")
    return write_synthetic(resolved, tmp_path_factory.mktemp("run") / "checkpoints")


def test_a_merged_model_loads_and_has_the_checkpoints_values(checkpoint, tmp_path):
    finish(start("merge_checkpoint.py", checkpoint.parent.parent, "--output", tmp_path / "merged"))
    weights = open_state(checkpoint)[0][WEIGHTS]
    state = load_model(tmp_path / "merged").state_dict()
    for name, value in state.items():
        assert torch.equal(value, weights.read(name)), name
    assert read_metadata(tmp_path / "merged")["step"] == 1
    half = tmp_path / "half"
    finish(start("merge_checkpoint.py", checkpoint, "--output", half, "--dtype", "bfloat16", "--max-file-bytes", 10**6))
    found = TensorFolder(half)
    assert found.specs()["recurrent.injection.log_A"].dtype == torch.float32
    name = "recurrent.layers.1.moe.experts.w2"
    assert torch.equal(found.read(name), weights.read(name).bfloat16())
    assert (half / "model.safetensors.index.json").is_file()


def test_dry_runs_write_nothing_and_say_the_size(checkpoint, tmp_path):
    plan = json.loads(finish(start("merge_checkpoint.py", checkpoint, "--dry-run", "--json")))
    weights = open_state(checkpoint)[0][WEIGHTS]
    assert plan["bytes"] == sum(spec.nbytes for spec in weights.specs().values())
    assert plan["tensors"] == len(weights.specs())
    plan = json.loads(finish(start("merge_checkpoint.py", "--config", "1t", "--dry-run", "--json")))
    assert 3.9e12 < plan["bytes"] < 4.1e12
    assert plan["hours"] == pytest.approx(2 * plan["bytes"] / plan["bandwidth"] / 3600, rel=0.01)


def test_inspection_counts_and_finds_what_is_not_finite(checkpoint, tmp_path):
    found = json.loads(finish(start("inspect_checkpoint.py", checkpoint, "--json")))
    assert found["layout"]["ep_size"] == 2
    embedding = found["tensors"]["weights"]["embed.weight"]
    assert embedding["shape"] == [4096, 128]
    assert embedding["rms"] == pytest.approx(1.0, abs=0.02)
    assert embedding["not_finite"] == 0
    process = start("inspect_checkpoint.py", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert "no complete checkpoint" in errors


@pytest.mark.slow
def test_two_gigabytes_are_merged_in_less_than_half_a_gigabyte(tmp_path):
    resolved = run_of(
        8, "parallel.ep_size=4", "model.dim=1024", "model.n_heads=8", "model.n_kv_heads=4", "model.ffn_dim=4096",
        "model.n_experts=64", "model.expert_dim=576", "model.recurrent_layers=4", "training.micro_batch_size=1",
    )  # fmt: skip
    tag = write_synthetic(resolved, tmp_path / "checkpoints")
    size = sum(path.stat().st_size for path in tag.glob("*optim_states.pt"))
    assert size > 1.9e9
    process = start("merge_checkpoint.py", tag, "--output", tmp_path / "merged", "--dtype", "bfloat16")
    most = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
        most = max(most, int(fields.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.02)
    finish(process)
    assert 50e6 < most < LIMIT_BYTES
    weights = open_state(tag)[0][WEIGHTS]
    name = "recurrent.layers.3.moe.experts.w3"
    rows = slice(60, 64)
    assert torch.equal(TensorFolder(tmp_path / "merged").read(name, rows), weights.read(name, rows).bfloat16())


def test_verification_names_every_fault(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / checkpoint.name)
    tag = tmp_path / "run" / "checkpoints" / checkpoint.name
    (tag.parent / "latest").write_text(tag.name)
    assert "whole" in finish(start("verify_checkpoint.py", tmp_path / "run"))
    first, second, third = sorted(tag.glob("*optim_states.pt"))[:3]
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 4
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    (tag.parent / "latest").write_text("")
    process = start("verify_checkpoint.py", tmp_path / "run", "--json")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    found = json.loads(output)
    named = " ".join(found[str(tag)])
    assert len(found[str(tag)]) == 3
    assert all(path.name in named for path in (first, second, third))
    assert found[str(tag.parent / "latest")] == ["names 'nothing', which is no checkpoint"]
    finish(start("merge_checkpoint.py", checkpoint, "--output", tmp_path / "merged"))
    assert "whole" in finish(start("verify_checkpoint.py", tmp_path / "merged"))
    weights = tmp_path / "merged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    process = start("verify_checkpoint.py", tmp_path / "merged")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, "not what was written" in output) == (1, True)


def test_the_built_in_model_has_a_runs_tokenizer():
    state = TrainingState(1, 8, None, {}, {"data": {"tokenizer": "tiny", "data_dir": "data"}})
    assert Tokenizer.load(tokenizer_of(state)).path == ROOT / "models" / "tiny" / "tokenizer.model"
    assert chat_of(state) is None


@pytest.mark.parametrize("stages", [["chat", "text"], ["text", "chat"], ["chat", "other"], ["text", "text"], ["chat"]])
def test_the_chat_template_is_that_of_the_last_stage_with_conversations(stages):
    chats = {
        "text": {"content": ["x"]},
        "chat": {"content": ["y"], "conversations": {"chat_template": "one", "ends": [3, 4]}},
        "other": {"content": ["z"], "conversations": {"chat_template": "two", "ends": [5]}},
    }
    pinned = [{"dataset": chats[stage]} for stage in stages]
    run = {"pinned": pinned[-1], "former_stages": [{"pinned": each} for each in pinned[:-1]]}
    found = chat_of(TrainingState(1, 8, None, {}, {}, run=run))
    expected = {"chat": ("one", {3, 4}), "other": ("two", {5})}.get(next((s for s in stages[::-1] if s != "text"), ""))
    assert (found and (found.template, found.ends)) == expected


def test_a_run_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder.*; allowed: a run or a checkpoint") as told:
        newest_tag(tmp_path / "nowhere")
    assert told.value.code == "MDS513"


@pytest.mark.parametrize(("prompts", "expected"), [(["Once", "Then"], '"Once"'), ([], '"The"')])
def test_a_card_begins_with_the_runs_own_prompt(prompts, expected):
    config = load_config("tiny", [f"monitor.sample_prompts={json.dumps(prompts)}"]).config.model_dump(mode="json")
    metadata = metadata_of(TrainingState(1, 1, 1.0, {"ep_size": 1}, config))
    sizes = {"num_prelude_layers": 1, "num_recurrent_layers": 1, "num_coda_layers": 1, "hidden_size": 8}
    more = {"n_routed_experts": 4, "num_experts_per_tok": 1, "mean_recurrence": 4, "max_loops": 8}
    assert f"inputs = tokenizer({expected}, " in model_card({**sizes, **more}, metadata)
