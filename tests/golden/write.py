"""Records the golden losses anew, for a change that is meant to alter computation.

python -m tests.golden.write            all presets
python -m tests.golden.write tiny 1t    some of them
python -m tests.golden.write --tokens   the token file; all losses change with it
python -m tests.golden.write --processor    the same computation's losses where another processor rounds otherwise
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden.runs import LOSSES, OTHERS, digest, names, record, rounding
from tests.golden.tokens import TOKENS, write_tokens


def main(arguments: list[str]) -> int:
    """Train, write after each preset, and print what the changelog must say."""
    if arguments == ["--tokens"]:
        for path in TOKENS.parent.glob("tokens.[bij]*"):
            path.unlink()
        write_tokens(TOKENS)
        return 0
    if arguments == ["--processor"]:
        return record_processor()
    if unknown := sorted(set(arguments) - set(names())):
        sys.stderr.write(f"{unknown[0]}: no preset with a golden run; allowed: {', '.join(names())}\n")
        return 2
    recorded: dict[str, Any] = json.loads(LOSSES.read_text()) if arguments and LOSSES.exists() else {"runs": {}}
    recorded["torch"] = torch.__version__
    for preset in arguments or names():
        with tempfile.TemporaryDirectory() as folder:
            recorded["runs"][preset] = record(preset, Path(folder))
        for others in recorded.get(OTHERS, {}).values():
            others.pop(preset, None)
        LOSSES.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
        sys.stdout.write(f"{preset}: {recorded['runs'][preset]['loss'][-1]:.4f} after the last step\n")
    sys.stdout.write(
        f"CHANGELOG.md: an **N** entry above the others must name: golden losses `{digest(recorded['runs'])}`\n"
    )
    return 0


def record_processor() -> int:
    """Add the numbers of this machine's rounding; a test holds them to be those that are there but for rounding."""
    recorded: dict[str, Any] = json.loads(LOSSES.read_text())
    own = recorded.setdefault(OTHERS, {}).setdefault(rounding(), {})
    for preset in names():
        with tempfile.TemporaryDirectory() as folder:
            own[preset] = record(preset, Path(folder))
        LOSSES.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
        sys.stdout.write(f"{preset}: {own[preset]['loss'][-1]:.4f} after the last step\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
