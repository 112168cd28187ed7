"""Make a looped mixture-of-experts model of a dense one, and train it for a few steps.

The dense model is a small random llama, so that nothing is downloaded; a folder of a real llama, mistral, qwen2, qwen3,
olmo2 or smollm takes its place. Needs the extra `hf`. Writes to the folder `upcycled`.
"""

import json
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import mythos_ds

FOLDER = Path("upcycled")
ONE_PROCESS = ["parallel.ep_size=1", "parallel.zero_stage=0", "deepspeed.zero_optimization=null"]
SHORT = ["training.max_steps=3", "training.warmup_steps=1", "training.eval_batches=1", "monitor.sample_tokens=4"]


def dense_model(folder: Path) -> None:
    """Write a random llama of six layers, with the vocabulary of the built-in corpus."""
    shape = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)


if __name__ == "__main__":  # making the corpus takes processes that read this file again
    dense_model(FOLDER / "dense")
    notes = mythos_ds.convert(
        FOLDER / "dense",
        FOLDER / "looped",
        from_format="hf",
        to_format="mythos",
        prelude=2,  # layers of the dense model, in order
        recurrent=2,
        coda=2,
        experts=4,  # made of each feed-forward of the looped block
        granularity=2,
        experts_per_token=2,
    )
    for note in notes:
        print("note:", note)

    file = FOLDER / "run.json"
    make_file = ["init-config", str(FOLDER / "looped"), "--like", "tiny.json", "--output", str(file)]
    subprocess.run([sys.executable, "-m", "mythos_ds", *make_file], check=True)
    print("loops on average:", json.loads(file.read_text())["model"]["mean_recurrence"])

    run = mythos_ds.pretrain(file, run_dir=FOLDER / "run", overrides=[*ONE_PROCESS, *SHORT])
    print(repr(mythos_ds.generate(run, "def main(", new_tokens=8)))
