"""Writes docs/presets.md: what every preset holds and costs."""

import argparse
import json
import sys
from pathlib import Path

from mythos_ds.config.loader import list_presets, load_config
from mythos_ds.costs.preset_page import preset_page

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is not current")
    arguments = parser.parse_args()
    page = build_page()
    path = ROOT / "docs" / "presets.md"
    current = path.is_file() and path.read_text(encoding="utf-8") == page
    if not current and not arguments.check:
        path.write_text(page, encoding="utf-8")
    if not current:
        sys.stdout.write(f"{path.relative_to(ROOT)}: {'not current' if arguments.check else 'written'}\n")
    return 1 if arguments.check and not current else 0


def build_page() -> str:
    """The page for the presets of this checkout."""
    loaded = [(name, load_config(str(ROOT / "ds_configs" / f"{name}.json"))) for name in list_presets()]
    return preset_page([(name, run.stages, json.loads(run.text)["_about"]) for name, run in loaded])


if __name__ == "__main__":
    sys.exit(main())
