"""Writes the configuration's schema for editors, docs/config.md and docs/troubleshooting.md from the code."""

import argparse
import json
import sys
from pathlib import Path

from mythos_ds.config.reference import json_schema, reference_page
from mythos_ds.error_codes import troubleshooting_page

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not current")
    arguments = parser.parse_args()
    contents = {
        ROOT / "ds_configs" / "schema.json": json.dumps(json_schema(), indent=2) + "\n",
        ROOT / "docs" / "config.md": reference_page(),
        ROOT / "docs" / "troubleshooting.md": troubleshooting_page(),
    }
    stale = [path for path, text in contents.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not arguments.check:
            path.write_text(contents[path], encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}: {'not current' if arguments.check else 'written'}\n")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
