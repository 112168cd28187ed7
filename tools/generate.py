"""Continue a text with a model from its folder, at any depth.

mythos-ds generate "def main(" --model tiny
mythos-ds generate "The function returns" --loops 8 --tokens 100 --temperature 0
mythos-ds generate --chat "What is a loop?" --model looped
mythos-ds generate --chat conversation.json --model looped
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from mythos_ds.api import check_generation, generate
from mythos_ds.data.chat import Message, read_messages
from mythos_ds.mains import run_tool


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("prompt", help="a text; with --chat a message, or a JSON file of messages")
    made.add_argument("--chat", action="store_true", help="answer in the model's chat template")
    made.add_argument("--model", default="tiny", help="a model folder, a run, a checkpoint, or tiny")
    made.add_argument("--loops", type=int, help="default: the mean of training")
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    made.add_argument("--seed", type=int, default=0)
    return made


def work(arguments: Namespace) -> None:
    for name in ("loops", "tokens", "temperature", "seed"):
        check_generation("--", **{name: getattr(arguments, name)})
    prompt: str | list[Message] = arguments.prompt
    if arguments.chat:
        path = Path(arguments.prompt)
        is_file = path.suffix == ".json" and path.is_file()
        prompt = read_messages(path) if is_file else [{"role": "user", "content": arguments.prompt}]
    begin, shown = "" if arguments.chat else arguments.prompt, ""

    def show(text: str) -> None:
        nonlocal shown
        sys.stdout.write(text if shown else begin + text)
        sys.stdout.flush()
        shown += text

    continuation = generate(
        arguments.model,
        prompt,
        loops=arguments.loops,
        new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        on_text=show if sys.stdout.isatty() else None,
    )
    sys.stdout.write((continuation.removeprefix(shown) if shown else begin + continuation) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
