"""Teach the model that is installed with the package a made-up skill by conversations, and ask it over chat.

The skill: a request in words becomes a line in a fixed format. No request of the test is among those of the training.
`python 05_instruction_tuning.py STEPS` trains for another number of steps. Writes to the folder `tuned`.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import mythos_ds

FOLDER, HELD_OUT, STEPS = Path("tuned"), 200, 120
SYLLABLES = ["ka", "lo", "mi", "ru", "se", "to", "vi", "na", "pe", "du"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""The model's tokenizer has these two special tokens, and no chat template of its own."""


def request(generator: random.Random) -> dict[str, str]:
    """A request and its answer, as one line of JSON holds them."""
    start, end = ("".join(generator.choices(SYLLABLES, k=2)).capitalize() for _ in range(2))
    seats = generator.randint(1, 9)
    return {"prompt": f"Please book {seats} seats from {start} to {end}.", "response": f"TICKET[{start}>{end}|{seats}]"}


def overrides(steps: int) -> list[str]:
    """What is unlike the preset `tiny`."""
    return [
        "data.corpus=null",
        f'data.datasets=[{{"prefix": "{FOLDER}/tokens"}}]',
        "data.tokenizer=tiny",
        "data.split=[98,2,0]",
        f"data.data_dir={FOLDER}/data",
        "training.init_from=tiny",
        f"training.max_steps={steps}",
        f"training.warmup_steps={min(20, steps - 1)}",
        "training.lr=0.002",
        "training.seq_len=128",
        "training.eval_batches=1",
        "training.eval_interval=0",
        "parallel.ep_size=1",
        "parallel.zero_stage=0",
        "deepspeed.zero_optimization=null",
    ]


def main(steps: int) -> None:
    """Make conversations, prepare them, train, ask."""
    generator = random.Random(0)
    made = {json.dumps(request(generator)) for _ in range(8000)}
    learnt = sorted(made)
    generator.shuffle(learnt)
    asked, learnt = learnt[:HELD_OUT], learnt[HELD_OUT:]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "chats.jsonl").write_text("\n".join(learnt) + "\n")
    (FOLDER / "template.jinja").write_text(TEMPLATE)
    prepare = ["prepare-data", f"{FOLDER}/chats.jsonl", "--chat", "--chat-template", f"{FOLDER}/template.jinja"]
    prepare += ["--tokenizer", "tiny", "--output", f"{FOLDER}/tokens", "--overwrite"]
    subprocess.run([sys.executable, "-m", "mythos_ds", *prepare], check=True)

    run = mythos_ds.pretrain("tiny", run_dir=FOLDER / "run", overrides=overrides(steps))

    merge = ["merge", str(run), "--output", f"{FOLDER}/model"]
    subprocess.run([sys.executable, "-m", "mythos_ds", *merge], check=True)
    model = mythos_ds.MythosModel.from_pretrained(FOLDER / "model")
    tokenizer = mythos_ds.Tokenizer.load(FOLDER / "model")
    right = 0
    for line in map(json.loads, asked):
        chat = [{"role": "user", "content": line["prompt"]}]
        answer = mythos_ds.generate(model, chat, tokenizer=tokenizer, new_tokens=32, temperature=0)
        right += answer == line["response"]
    print(f"{line['prompt']} -> {answer}")
    print(f"{right} of {len(asked)} requests that were not in training are answered right")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
