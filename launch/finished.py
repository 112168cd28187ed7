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
    stem = Path(arguments.config).stem + ("-proxy" if arguments.proxy else "")
    run_dir: Path = arguments.run_dir or Path("runs") / stem
    try:
        total = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["total_steps"]
        newest = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        step = int(newest.rpartition("_")[2])
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{run_dir}: stopped before its first checkpoint ({error})")
        return UNFINISHED_EXIT_CODE
    print(f"{run_dir}: step {step} of {total} is saved")
    return 0 if step >= total else UNFINISHED_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
