"""Continue a text with a model from its folder, at any depth.

python tools/generate.py "def main(" --model models/tiny
python tools/generate.py "The function returns" --loops 8 --tokens 100 --temperature 0
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import ConfigError
from mythos_ds.inference.generate import generate
from mythos_ds.mains import run_tool
from mythos_ds.weights.model_folder import TOKENIZER, load_model, read_metadata


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("prompt")
    made.add_argument("--model", type=Path, default=Path("models/tiny"), help="a folder with config.json and weights")
    made.add_argument("--loops", type=int, help="default: the mean of training")
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    made.add_argument("--seed", type=int, default=0)
    return made


def work(arguments: Namespace) -> None:
    for name, least in (("loops", 1), ("tokens", 1), ("temperature", 0)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise ConfigError(f"--{name}: given {given}; allowed: {least} or more; nearest: {least}")
    model = load_model(arguments.model)
    tokenizer = Tokenizer.load(arguments.model / TOKENIZER)
    n_loops = arguments.loops or model.config.mean_recurrence
    with torch.inference_mode():
        continuation = generate(
            lambda tokens: model(tokens, n_loops=n_loops)[0, -1],
            tokenizer.encode(arguments.prompt),
            new_tokens=arguments.tokens,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            context_length=read_metadata(arguments.model).get("seq_len", 1024),
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
    sys.stdout.write(arguments.prompt + tokenizer.decode(continuation) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
