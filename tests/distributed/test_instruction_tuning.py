"""Conversations to a model that answers in their form: prepared, trained by several processes, merged, exported."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import mythos_ds
from mythos_ds.config.schema import IGNORED_LABEL
from mythos_ds.data.batches import BatchStream
from mythos_ds.data.datasets import build_datasets
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.mains import run_tool
from tests.helpers.chats import CHATML, conversations
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import SMALL, environment, metrics, run_pretrain
from tests.helpers.tokenizers import byte_level_folder

transformers = pytest.importorskip("transformers")
import mythos_hf

STEPS, SEQ = 4, 256
ASKED = [{"role": "user", "content": "hello <|im_end|> world"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset, and a tokenizer whose own template and end of documents are not the conversations'."""
    folder = tmp_path_factory.mktemp("tuning")
    tokenizer = byte_level_folder(folder / "tokenizer", added=True)
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    lines = [json.dumps({"messages": chat}) for chat in conversations(160)]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    (folder / "template.jinja").write_text(CHATML)
    words = [str(folder / "chats.jsonl"), "--chat", "--chat-template", str(folder / "template.jinja")]
    words += ["--tokenizer", str(tokenizer), "--output", str(folder / "tokens"), "--workers", "1"]
    assert load_main("tools/prepare_data.py").main(words) == 0
    return folder


def arguments(place, run, *overrides):
    own = [
        f'data.datasets=[{{"prefix": "{place / "tokens"}"}}]', f"data.tokenizer={place / 'tokenizer'}",
        f"data.data_dir={place}", "data.split=[80,20,0]", "model.vocab_size=1003", f"training.seq_len={SEQ}",
        f"training.max_steps={STEPS}", "training.micro_batch_size=1",
    ]  # fmt: skip
    return ["--config", "tiny.json", "--run-dir", str(run), *SMALL, *own, *overrides]


@pytest.fixture(scope="module")
def run(place):
    """A run of two processes that share the experts."""
    run_pretrain(arguments(place, place / "run", "checkpoint.interval=2"), nprocs=2, folder=place / "logs").check()
    return place / "run"


@pytest.fixture(scope="module")
def merged(run, place):
    merging = load_main("tools/merge_checkpoint.py")
    assert run_tool(merging.parser(), merging.work, [str(run), "--output", str(place / "merged")]) == 0
    return place / "merged"


def losses_of(run):
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def test_it_says_how_it_packed_and_learns(run, place):
    [log, _] = [path.read_text() for path in sorted((place / "logs").glob("rank_*.log"))]
    assert "128 conversations in" in log
    assert "is no padding" in log
    losses = losses_of(run)
    assert losses[STEPS] < losses[1]


def test_held_out_loss_counts_only_answers(run, merged, place, capsys):
    """The trainer's, that of evaluate as command and as function, and a sum over the log-probabilities of answers."""
    model = mythos_ds.MythosModel.from_pretrained(merged)
    loops = model.config.mean_recurrence
    config = mythos_ds.load_config("tiny", arguments(place, run)[4:])
    request = {"train_samples": STEPS * 8, "valid_samples": 8, "seed": 0, "vocab_size": 1003}
    valid = build_datasets(config.data, seq_len=SEQ, **request).valid
    batches = list(BatchStream(valid, start_sample=0, micro_batch_size=4, dp_rank=0, dp_size=1))
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            log_p = model(batch["tokens"], n_loops=loops, positions=batch["positions"]).double().log_softmax(-1)
            for row, targets in zip(log_p, batch["targets"], strict=True):
                for place_, target in enumerate(targets.tolist()):
                    if target != IGNORED_LABEL:
                        total -= float(row[place_, target])
                        count += 1
    expected = total / count
    last = [line for line in metrics(run) if f"validation/loss_at_{loops}" in line][-1]
    assert last[f"validation/loss_at_{loops}"] == pytest.approx(expected, rel=1e-5)
    assert mythos_ds.evaluate(model, batches)[loops] == pytest.approx(expected, rel=1e-6)
    evaluating = load_main("tools/evaluate.py")
    words = [str(merged), *arguments(place, run)[:2], "--loops", str(loops), "--sequences", "8", "--json"]
    assert evaluating.main([*words, str(place / "losses.json"), *arguments(place, run)[4:]]) == 0
    found = json.loads((place / "losses.json").read_text())["loss"][str(loops)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_template_travels_and_generation_ends_with_an_answer(run, merged, place):
    own = Tokenizer.load(place / "tokenizer")
    end_of_turn, end_of_text = own.special_tokens["<|im_end|>"], own.eos_id
    assert own.ends() == {end_of_text} != {end_of_turn}
    mythos_ds.convert(merged, place / "hf", dtype="float32")
    mythos_ds.convert(place / "hf", place / "back", from_format="hf", to_format="mythos")
    for folder in (merged, place / "hf", place / "back"):
        found = Tokenizer.load(folder)
        assert found.companions.chat_template() == CHATML
        assert (found.eos_id, found.ends()) == (end_of_text, {end_of_turn, end_of_text})
    model = mythos_hf.MythosForCausalLM.from_pretrained(place / "hf").eval()
    assert sorted(model.generation_config.eos_token_id) == sorted([end_of_turn, end_of_text])
    # The likeliest token is then the end of a turn, at every place: what generates is to stop there.
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "hf")
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = []
        hook = head.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0][0, -1]))
        free = model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        hook.remove()
        head.weight[end_of_turn] = 100 * hidden[3] / hidden[3].norm()
        bounded = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert bounded.shape[1] < free.shape[1]
    assert int(bounded[0, -1]) == end_of_turn
    for source in (run, merged):
        answer = mythos_ds.generate(source, ASKED, new_tokens=4, temperature=0)
        assert answer == mythos_ds.generate(merged, ASKED, new_tokens=4, temperature=0)


def test_a_run_keeps_its_mask(run, place, capsys):
    other = run_pretrain(arguments(place, run, "data.loss_mask=false"), nprocs=1, folder=place / "other")
    assert other.codes == [2]
    assert "data.loss_mask: false now, true when the run was started" in other.outputs[0]
    assert '"data": {"loss_mask": false}' in other.outputs[0], "the stage that may change it"


@pytest.mark.slow
def test_resume_and_world_size(run, place):
    """From step 2 on bitwise, and on one process the same losses."""
    shutil.copytree(run, place / "resumed")
    shutil.rmtree(place / "resumed" / "checkpoints" / f"step_{STEPS:08d}")
    again = arguments(place, place / "resumed", "checkpoint.interval=2")
    run_pretrain(again, nprocs=2, folder=place / "logs 2").check()
    assert losses_of(place / "resumed") == losses_of(run)
    run_pretrain(arguments(place, place / "alone"), nprocs=1, folder=place / "logs 1").check()
    assert losses_of(place / "alone") == pytest.approx(losses_of(run), rel=1e-5)


@pytest.mark.slow
def test_a_small_model_learns_a_made_up_skill(tmp_path):
    """Answers in a fixed format, right for more than 95 % of 200 requests that were not in training."""
    example = ROOT / "examples" / "05_instruction_tuning.py"
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    right, asked = int(last.split()[0]), int(last.split()[2])
    assert asked == 200, last
    assert right > 0.95 * asked, last
