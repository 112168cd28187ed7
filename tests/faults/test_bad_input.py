"""Wrong configurations and data end with one clear message and exit code 2, never with a traceback."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.pretrain import SCRIPT, SMALL, environment, run_pretrain, run_under_deepspeed, small_data
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

HELD = "deepspeed.zero_optimization.stage3_param_persistence_threshold=null"


def run(arguments, folder):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def check_message(finished, parts):
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    for part in parts:
        assert part in output


# Without a launcher there is one process; RANK and WORLD_SIZE tell a process of a larger run.
CONFIGURATIONS = {
    "unknown key": (["model.n_expert=8"], ["model.n_expert", "n_experts"]),
    "unknown section": (["trainin.lr=0.1"], ["trainin", "training"]),
    "misspelt DeepSpeed key": (["deepspeed.zero_optimisation.stage=2"], ["zero_optimisation", "zero_optimization"]),
    "derived DeepSpeed key": (["deepspeed.train_batch_size=8"], ["train_batch_size"]),
    "ep_size does not divide the processes": (["parallel.ep_size=2"], ["parallel.ep_size"]),
    "ep_size does not divide the experts": (["parallel.ep_size=3"], ["parallel.ep_size"]),
    "batch not divisible": (["training.global_batch_size=9"], ["global_batch_size", "9"]),
    "wrong type": (['training.lr="fast"'], ["training.lr", "fast"]),
    "max_loops 0": (["model.max_loops=0"], ["model.max_loops"]),
    "mla fields in a gqa model": (["model.kv_lora_rank=16"], ["kv_lora_rank"]),
    "gqa fields in an mla model": (["model.attn_type=mla"], ["kv_lora_rank"]),
    "more chosen experts than there are": (["model.n_experts_per_tok=17"], ["n_experts_per_tok", "16"]),
    "both datasets and corpus": (['data.datasets=[{"prefix": "x"}]', "data.corpus=builtin"], ["data."]),
    "override without a value": (["training.lr"], ["training.lr", "section.key=value"]),
    "override without a section": (["lr=3"], ["lr=3", "section.key=value"]),
    "not a number": (["training.lr=NaN"], ["training.lr"]),
    "pipeline stages without a layer of the loop": (["parallel.pp_size=2"], ["parallel.pp_size", "nearest: 1"]),
    "no such pipeline": (['parallel.pp_size="ring"'], ["parallel.pp_size", "ring"]),
    "two literal stages": (["parallel.pp_size=[1,2]"], ["parallel.pp_size", "[1, 2] given", "nearest: [1, 1, 1]"]),
    "halting in a pipeline": (
        ["model.recurrent_layers=2", "parallel.pp_size=2", HELD, "model.halting=act"],
        ["model.halting", 'allowed: "none"'],
    ),
    "a preset's key without effect in a pipeline": (
        ["model.recurrent_layers=2", "parallel.pp_size=2"],
        ["stage3_param_persistence_threshold", "set it to null"],
    ),
    "processes to plan for in a run": (["--world-size", "4"], ["--world-size", "--dry-run"]),
    "no processes to plan for": (["--dry-run", "--world-size", "0"], ["--world-size", "at least 1"]),
    "vocabulary below the tokenizer's": (["model.vocab_size=100"], ["vocab"]),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_wrong_configuration(name, tmp_path):
    overrides, parts = CONFIGURATIONS[name]
    check_message(run(["--config", "tiny.json", *overrides], tmp_path), parts)
    assert list(tmp_path.iterdir()) == []


def run_as_one_of(world_size, overrides, folder):
    """The first of `world_size` processes, alone: it must refuse before it waits for the others."""
    size = str(world_size)
    variables = {**environment(), "RANK": "0", "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": size}
    command = [sys.executable, str(SCRIPT), "--config", "tiny", *overrides]
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_zero_0_with_expert_parallelism_names_the_nearest(tmp_path):
    finished = run_as_one_of(2, ["parallel.zero_stage=0", "parallel.ep_size=2"], tmp_path)
    check_message(finished, ["zero_stage", "1"])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel.pp_size=3"], ["parallel.pp_size", "nearest: 2 or 4"]),
        (["parallel.pp_size=[1,2,2]"], ["parallel.pp_size", "nearest: [1, 1, 2]"]),
        (["parallel.pp_size=2", "parallel.ep_size=4"], ["parallel.ep_size", "nearest: 2"]),
        (["parallel.pp_size=2"], ["training.global_batch_size", "8 given", "nearest: 16"]),
    ],
)
def test_a_pipeline_that_does_not_fit_the_processes(overrides, parts, tmp_path):
    enough = ["training.global_batch_size=16"] if "nearest: 16" not in parts else []
    finished = run_as_one_of(4, ["model.recurrent_layers=4", HELD, *enough, *overrides], tmp_path)
    check_message(finished, parts)


def test_all_problems_are_listed_at_once(tmp_path):
    overrides = ["model.n_expert=8", "training.lr=-1", "checkpoint.kep=3"]
    check_message(run(["--config", "tiny", *overrides], tmp_path), ["n_expert", "training.lr", "checkpoint.kep"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"model": {"dim": 8,}}', ["line 1", "JSON"]),
        ("", ["JSON"]),
        ("[1, 2]", ["object"]),
        ('{"model": {"dim": 8, "dim": 16}}', ["dim", "twice"]),
        ("{}", ["model", "training", "data"]),
    ],
)
def test_wrong_file_content(text, parts, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    check_message(run(["--config", str(path)], tmp_path), ["mine.json", *parts])


def test_missing_file_names_the_presets(tmp_path):
    check_message(run(["--config", "1tt.json"], tmp_path), ["1tt.json", "1t", "presets"])


@pytest.mark.parametrize("text", [b"", b"\xff\xfe{"])
def test_file_that_is_not_text(text, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(text)
    check_message(run(["--config", str(path)], tmp_path), ["mine.json"])


def with_data(folder, words, *overrides, prefix=None, tokenizer=None):
    """Arguments of a small run on the dataset `words`, or on what replaces a part of it."""
    prefix, tokenizer = prefix or words.prefix, tokenizer or words.tokenizer
    data = [f'data.datasets=[{{"prefix": "{prefix}"}}]', f"data.tokenizer={tokenizer}", f"data.data_dir={folder}"]
    start = ["--config", "tiny", "--run-dir", str(folder / "run"), *SMALL, "training.max_steps=3", *data]
    return [*start, "model.vocab_size=512", *overrides]


@dataclass(frozen=True)
class Words:
    prefix: Path
    tokenizer: Path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokenizer = make_tokenizer(folder)
    make_dataset(folder / "words", tokenizer, make_texts(50))
    return Words(folder / "words", tokenizer.path)


def test_missing_tokenizer(words, tmp_path):
    arguments = with_data(tmp_path, words, tokenizer=tmp_path / "nothing.model")
    check_message(run(arguments, tmp_path), ["nothing.model", "mythos-ds train-tokenizer"])


def test_missing_data_file(words, tmp_path):
    check_message(run(with_data(tmp_path, words, prefix=tmp_path / "nothing"), tmp_path), [str(tmp_path / "nothing")])
    assert not (tmp_path / "run").exists(), "what the refused start made is gone"


def test_damaged_data_file(words, tmp_path):
    for path in words.prefix.parent.glob("words.*"):
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:-10] if path.suffix == ".bin" else content)
    arguments = with_data(tmp_path, words, prefix=tmp_path / "words")
    check_message(run(arguments, tmp_path), [str(tmp_path / "words")])


def test_model_with_too_few_rows_for_the_tokenizer(words, tmp_path):
    arguments = with_data(tmp_path, words, "model.vocab_size=100")
    check_message(run(arguments, tmp_path), ["model.vocab_size 100", "at least"])


def test_data_of_another_tokenizer(words, tmp_path):
    other = make_tokenizer(tmp_path, vocab_size=350, seed=1)
    arguments = with_data(tmp_path, words, tokenizer=other.path)
    check_message(run(arguments, tmp_path), [str(words.prefix), "another tokenizer"])


def test_checkpoints_that_cannot_be_used(tmp_path):
    tag = tmp_path / "run" / "checkpoints" / "step_00000004"
    tag.mkdir(parents=True)
    (tag / "manifest.json").write_text("{")
    start = ["--config", "tiny", "--run-dir", str(tmp_path / "run"), f"data.data_dir={tmp_path}"]
    check_message(run(start, tmp_path), ["no complete checkpoint"])
    check_message(run([*start, "--resume", "never"], tmp_path), ["step_00000004", "--run-dir"])
    check_message(run([*start, "--resume", str(tmp_path / "nowhere")], tmp_path), ["nowhere"])


def test_two_ranks_say_it_once_and_both_end_with_2(words, tmp_path):
    arguments = with_data(tmp_path, words, prefix=tmp_path / "nothing")
    finished = run_pretrain(arguments, nprocs=2, folder=tmp_path / "logs")
    assert finished.codes == [2, 2]
    assert [output.count("error: ") for output in finished.outputs] == [1, 0]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        pytest.param(["training.max_stepz=3"], "max_stepz", marks=pytest.mark.slow),
        (["parallel.ep_size=4"], "parallel.ep_size"),
        (["data.tokenizer=nothing.model"], "nothing.model"),
    ],
)
def test_under_the_deepspeed_launcher_it_is_said_once(overrides, part, words, tmp_path):
    finished = run_under_deepspeed(with_data(tmp_path, words, *overrides), nprocs=2, folder=tmp_path)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    assert "Traceback" not in output
    reports = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(reports) == 1, output
    assert part in reports[0]


def test_a_value_that_deepspeed_refuses(tmp_path):
    wrong = ["deepspeed.zero_optimization.reduce_bucket_size=-5", "deepspeed.zero_optimization.overlap_comm=maybe"]
    arguments = ["--config", "tiny.json", "--run-dir", str(tmp_path / "run"), *SMALL, *small_data(tmp_path)]
    finished = run([*arguments, "training.max_steps=3", *wrong], tmp_path)
    check_message(finished, ["zero_optimization.reduce_bucket_size: -5 given", "zero_optimization.overlap_comm"])


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["--config", "tiny.json", "--run-dir", str(tmp_path / "file" / "run"), *SMALL, *small_data(tmp_path)]
    check_message(run([*arguments, "training.max_steps=3"], tmp_path), ["file"])
