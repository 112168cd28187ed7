"""Builds the sample index of a run, for all its training stages, on one machine, before it starts.

It is written into data.data_dir (shared storage). A run builds it itself where it is missing, while its other processes
wait; for trillions of tokens that is too long.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve_stages
from mythos_ds.mains import run_tool, tool_parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool_parser(__doc__ or "", "mythos-ds prepare-index --config 1t.json")
    parser.add_argument("--config", required=True, help="the run's configuration, as given to mythos-ds pretrain")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="the run's overrides")
    return run_tool(parser, _prepare, argv)


def _prepare(arguments: Namespace) -> None:
    from mythos_ds.data.datasets import prepare_index_cache
    from mythos_ds.train.data_loader import dataset_arguments
    from mythos_ds.train.run_changes import planned_manifests

    loaded = load_config(arguments.config, arguments.overrides)
    stages = resolve_stages(loaded.stages, planned_world_size(loaded.config))
    for stage, manifest in zip(stages, planned_manifests(stages), strict=True):
        data = stage.run.config.data
        needed = dataset_arguments(stage.run, manifest, 0)
        prepare_index_cache(data, **needed)
        whose = "" if stage.name is None else f" of stage {stage.name}"
        sys.stdout.write(f"index ready for {needed['train_samples']:,} training samples{whose} in {data.data_dir}\n")


if __name__ == "__main__":
    sys.exit(main())
