"""transformers' Trainer goes on from its checkpoints bit for bit; needs accelerate.

`make test-hf` runs it. As a module it is a process of the run on two processes:
`python -m torch.distributed.run --nproc-per-node 2 -m tests.optional.hf_trainer MODEL OUTPUT`.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import mythos_ds
import mythos_hf
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.weights.model_folder import load_model
from tests.helpers.paths import ROOT

TOKENS = torch.randint(10, 4000, (16, 64), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]
MODES: dict[str, dict[str, Any]] = {
    "one file": {},
    "several files": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def trainer(folder: Path, output: Path, *, files: str = "10GB", **options: Any) -> Trainer:
    """A trainer of a freshly loaded model for four steps, with a checkpoint after two, in files of at most so much."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained = partial(model.save_pretrained, max_shard_size=files)
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, **options}
    arguments = TrainingArguments(output_dir=str(output), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])


def differing(one: Any, other: Any) -> list[str]:
    """The names of the tensors that two models do not have in common, bit for bit."""
    given = other.state_dict()
    return [name for name, value in one.state_dict().items() if not torch.equal(value, given[name])]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_goes_on_is_the_whole_run(mode, tiny, tmp_path):
    files = "1MB" if mode == "several files" else "10GB"
    whole = trainer(tiny, tmp_path, files=files, **MODES[mode])
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (len(list(checkpoint.glob("*.safetensors"))) > 1) == (mode == "several files")
    saved = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert any(".experts." in name for name in differing(saved, AutoModelForCausalLM.from_pretrained(tiny)))
    restored = trainer(tiny, tmp_path, **MODES[mode])
    restored._load_from_checkpoint(str(checkpoint))
    assert differing(restored.model, saved) == []
    again = trainer(tiny, tmp_path, **MODES[mode])
    again.train(resume_from_checkpoint=str(checkpoint))
    assert differing(again.model, whole.model) == []


@pytest.mark.parametrize("files", ["10GB", "1MB"])
def test_the_best_model_comes_back_at_the_end(files, tiny, tmp_path):
    # Steps so long that the first checkpoint is the best.
    options = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 2}
    best = trainer(tiny, tmp_path, files=files, load_best_model_at_end=True, **options)
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert differing(best.model, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")) == []
    assert differing(best.model, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")) != []


def test_a_checkpoint_with_its_tokenizer_comes_back_as_a_model_folder(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for message in messages %}{{ '<s>' + message.content }}{% endfor %}"
    run: Any = trainer(tiny, tmp_path / "run")
    run.processing_class = tokenizer
    run.train()
    mythos_ds.convert(tmp_path / "run" / "checkpoint-4", tmp_path / "back", from_format="hf", to_format="mythos")
    with torch.no_grad():
        logits = load_model(tmp_path / "back")(TOKENS[:2], n_loops=4)
        assert (run.model.eval()(TOKENS[:2], n_loops=4).logits - logits).abs().max() <= 1e-5
    text = "def main(): </s>\n\n漢字"
    assert Tokenizer.load(tmp_path / "back").encode(text) == Tokenizer.load(ROOT / "models" / "tiny").encode(text)
    assert tokenizer.chat_template == (tmp_path / "back" / "chat_template.jinja").read_text(encoding="utf-8")


def test_two_processes_go_on_as_one_run_and_refuse_reentrant_checkpoints(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["tests.optional.hf_trainer", str(tiny), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"run_{rank}.json").read_text(encoding="utf-8"))
        assert (found["world"], found["unlike"], found["moved"]) == (2, [], True)
        assert "use_reentrant=True with several processes" in found["refused"]


def run_process(folder: Path, output: Path) -> None:
    """The part of one process: a whole run, one that goes on from its middle, and one that is refused."""
    options: dict[str, Any] = {"ddp_backend": "gloo", **MODES["checkpointing"]}
    whole = trainer(folder, output, **options)
    whole.train()
    again = trainer(folder, output, **options)
    again.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    options["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    refused = ""
    try:
        trainer(folder, output, **options).train()
    except ValueError as error:
        refused = str(error)
    found = {
        "world": whole.args.world_size,
        "unlike": differing(again.model, whole.model),
        "moved": bool(differing(whole.model, AutoModelForCausalLM.from_pretrained(folder))),
        "refused": refused,
    }
    path = output.with_name(f"{output.name}_{whole.args.process_index}.json")
    path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    # Versions before 5.24 load the optimizer to the device that accelerate names for processes on the CPU, cpu:0,
    # which torch.load does not know.
    torch.serialization.register_package(
        11, lambda _storage: None, lambda storage, location: storage if location == "cpu:0" else None
    )
    assert mythos_hf.MythosConfig.model_type == "mythos"
    run_process(Path(sys.argv[1]), Path(sys.argv[2]))
