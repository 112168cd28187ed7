"""Builds the sample index of a run, for all its training stages, on one machine, before it starts.

It is written into data.data_dir (shared storage). A run builds it itself where it is missing, while its other processes
wait; for trillions of tokens that is too long.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve_stages
from mythos_ds.config.training_stages import stages_from
from mythos_ds.mains import run_tool, tool_parser


def main(argv: Sequence[str] | None = None) -> int:
    examples = ["--config 1t.json", "--config next.json --resume runs/old --stage long"]
    parser = tool_parser(__doc__ or "", "\n  ".join(f"mythos-ds prepare-index {each}" for each in examples))
    parser.add_argument("--config", required=True, help="the run's configuration, as given to mythos-ds pretrain")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="run or checkpoint that it will go on from")
    parser.add_argument("--stage", metavar="NAME", help="with --resume: the training stage that begins there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="the run's overrides")
    return run_tool(parser, _prepare, argv)


def _prepare(arguments: Namespace) -> None:
    from mythos_ds.data.datasets import prepare_index_cache
    from mythos_ds.plan.index_requests import index_requests
    from mythos_ds.train.resume import choose_alone, names_of

    loaded = load_config(arguments.config, arguments.overrides)
    asked = stages_from(loaded.stages, arguments.stage, str(loaded.path))
    ahead = len(loaded.stages) - len(asked)
    stages = resolve_stages(asked, planned_world_size(loaded.config), loaded.stages[ahead - 1] if ahead else None)
    tag = None if arguments.resume is None else choose_alone(arguments.resume, arguments.stage)
    names = names_of(tag, str(loaded.path), arguments.overrides)
    for request in index_requests(stages, tag, names, arguments.stage):
        data, stage = request.stage.run.config.data, request.stage.name
        prepare_index_cache(data, **request.arguments)
        count, whose = request.arguments["train_samples"], "" if stage is None else f" of stage {stage}"
        sys.stdout.write(f"index ready for {count:,} training samples{whose} in {data.data_dir}\n")


if __name__ == "__main__":
    sys.exit(main())
