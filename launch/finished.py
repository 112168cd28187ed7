"""Whether a run has reached its planned length: exit code 0; or stopped before: 75, start it again. No torch.

    python launch/finished.py --config 1t.json [--run-dir DIR] ...      # the arguments of pretrain.py
"""

import json
import sys
from pathlib import Path

from pretrain import parse_arguments

UNFINISHED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h."""


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.dry_run or arguments.print_config:
        return 0
    stem = Path(arguments.config).stem + ("-proxy" if arguments.proxy else "")
    run_dir: Path = arguments.run_dir or Path("runs") / stem
    try:
        total = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["total_steps"]
        # Published checkpoints have a manifest; `latest` may be lost, and training does without it.
        saved = (run_dir / "checkpoints").glob("step_*/manifest.json")
        step = max(int(manifest.parent.name.rpartition("_")[2]) for manifest in saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{run_dir}: stopped before its first checkpoint ({error})")
        return UNFINISHED_EXIT_CODE
    print(f"{run_dir}: step {step} of {total} is saved")
    return 0 if step >= total else UNFINISHED_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
