"""What the tests of the exported model share."""

from pathlib import Path

import pytest

import mythos_ds
from tests.helpers.paths import ROOT

TINY = ROOT / "models" / "tiny"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released tiny model as a Hugging Face folder, fp32."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    mythos_ds.convert(TINY, folder, dtype="float32")
    return folder
