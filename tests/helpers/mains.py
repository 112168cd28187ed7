"""Loads a main of tools/ or launch/ by its file: type checkers cannot follow the names that mains have in a wheel."""

import importlib.util
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT


def load_main(path: str) -> Any:
    """The module of a file such as "tools/plan.py", executed anew."""
    file = ROOT / path
    specification = importlib.util.spec_from_file_location(Path(path).stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
