"""Continue a text with a model from its folder, at any depth.

mythos-ds generate "def main(" --model tiny
mythos-ds generate "The function returns" --loops 8 --tokens 100 --temperature 0
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from mythos_ds.api import generate
from mythos_ds.errors import ConfigError
from mythos_ds.mains import run_tool


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("prompt")
    made.add_argument("--model", default="tiny", help="a model folder, a run, a checkpoint, or tiny")
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
    continuation = generate(
        arguments.model,
        arguments.prompt,
        loops=arguments.loops,
        new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    sys.stdout.write(arguments.prompt + continuation + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
