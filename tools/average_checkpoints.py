"""Average models: the weighted mean of the weights of several model folders (mythos, or Hugging Face).

    mythos-ds average step_900 step_1000 step_1100 --output averaged
    mythos-ds average base tuned --output mixed --weights 1 3 --dry-run

Summed in fp32 and cast once, a few rows at a time. Router biases and counters are not averaged but taken from the last
folder. Refused: another configuration, tokenizer or set of tensors, and models that do not share a start, which is
judged from the weights themselves (docs/convert.md); --force averages those nevertheless.
"""

import json
import math
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_ds.conversion.average import (
    SAME_LINEAGE,
    Mean,
    SourceModel,
    check_alike,
    check_whole_models,
    lineage_metadata,
    similarity,
    write_averaged_side_files,
)
from mythos_ds.conversion.estimate import Estimate, estimate, print_estimate
from mythos_ds.conversion.writing_options import BANDWIDTH, add_writing, check_input, check_writing
from mythos_ds.conversion.written_model import refuse_input, write_model
from mythos_ds.errors import CheckpointError, ConfigError, OptionError
from mythos_ds.mains import add_share, run_tool
from mythos_ds.monitor.progress import byte_progress
from mythos_ds.weights.reader import TensorFolder
from mythos_ds.weights.writer import plan_files


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("models", type=Path, nargs="+", metavar="FOLDER", help="two or more model folders")
    made.add_argument("--output", type=Path, required=True, help="folder of the mean")
    made.add_argument("--weights", type=float, nargs="+", help="one for each folder; default: equal")
    made.add_argument("--force", action="store_true", help="average models that do not share a start")
    add_writing(made)
    add_share(made)
    return made


def work(arguments: Namespace) -> None:
    weights = checked_weights(arguments)
    models = [SourceModel.open(folder) for folder in arguments.models]
    check_alike(models)
    sources = [TensorFolder(model.folder) for model in models]
    mean = Mean(sources, weights)
    check_whole_models(models, sources)
    alike = [similarity(source, sources[-1]) for source in sources[:-1]]
    check_lineage(arguments, alike)
    specs = mean.specs()
    read = len(models) * sum(spec.nbytes for spec in specs.values())
    made = estimate(plan_files(specs, arguments.max_file_bytes), read, arguments.bandwidth or BANDWIDTH)
    if not arguments.dry_run:
        for model in models:
            check_input(model.folder)
        with byte_progress("averaging", made.bytes) as progress:
            write_model(
                mean,
                arguments.output,
                lambda output: write_averaged_side_files(models, mean.weights, output),
                command="average",
                made_from=", ".join(model.folder.resolve().name for model in models),
                jobs=arguments.jobs,
                max_file_bytes=arguments.max_file_bytes,
                progress=progress,
                break_lock=arguments.break_lock,
            )
    report(arguments, models, mean, alike, made)


def checked_weights(arguments: Namespace) -> list[float]:
    """One weight for each folder. Raises ConfigError for arguments that do not fit."""
    models = arguments.models
    if len(models) < 2:
        raise ConfigError(f"models: given {len(models)}; allowed: at least 2; nearest: 2")
    check_writing(arguments)
    refuse_input(arguments.output, models, what="averaged")
    weights: list[float] = arguments.weights or [1.0] * len(models)
    if len(weights) != len(models) or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        given = " ".join(f"{weight:g}" for weight in weights)
        raise OptionError(
            f"--weights: given {given}; allowed: {len(models)} numbers that are not negative, one for each folder"
        )
    return weights


def check_lineage(arguments: Namespace, alike: list[float]) -> None:
    """Raises CheckpointError where a model and the last one do not share a start, unless forced."""
    strangers = [i for i, value in enumerate(alike) if value < SAME_LINEAGE]
    if strangers and not arguments.force:
        first = strangers[0]
        raise CheckpointError(
            f"{arguments.models[first]}: its matrices have a cosine of {alike[first]:.2f} with those of "
            f"{arguments.models[-1]}; allowed: at least {SAME_LINEAGE:g}, as models of one start have (a mean of "
            "others is no model); nearest: --force",
            code="MDS517",
        )


def report(arguments: Namespace, models: list[SourceModel], mean: Mean, alike: list[float], made: Estimate) -> None:
    """What was averaged, how alike the models are, and what was not averaged."""
    if arguments.json:
        result: dict[str, Any] = {
            "models": [str(model.folder) for model in models],
            "weights": mean.weights,
            "cosine_with_last": alike,
            "recorded": lineage_metadata(models),
            "not_averaged": mean.kept,
            "written": not arguments.dry_run,
            "estimate": asdict(made),
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    recorded = lineage_metadata(models)
    for i, model in enumerate(models):
        cosine = f"cosine with the last {alike[i]:.4f}" if i < len(alike) else "the last"
        metadata = ", ".join(f"{name} {values[i]}" for name, values in recorded.items() if values[i] is not None)
        sys.stdout.write(f"{model.folder}: weight {mean.weights[i]:.4g}, {cosine}; {metadata or 'nothing recorded'}\n")
    sys.stdout.write(f"not averaged, from {models[-1].folder}: {', '.join(mean.kept) or 'nothing'}\n")
    print_estimate(f"{arguments.output}{' (nothing written)' if arguments.dry_run else ''}", made, False)


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
