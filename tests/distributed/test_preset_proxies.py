"""Each preset is executed, as its proxy, on two processes: 1t.json runs wherever the tests run."""

import math
from pathlib import Path

import pytest

from mythos_ds.config.loader import load_config
from tests.helpers.distributed import ROOT, run_distributed

PRESETS = sorted(path.name for path in Path(ROOT, "ds_configs").glob("*.json") if path.name != "schema.json")
ENDS = ["1b.json", "1t.json"]


@pytest.mark.parametrize(
    "presets",
    [ENDS, pytest.param([name for name in PRESETS if name not in ENDS], marks=pytest.mark.slow)],
    ids=["ends", "others"],
)
def test_every_proxy_trains_three_steps(presets: list[str]) -> None:
    ranks = run_distributed("tests.distributed.preset_cases:train_proxies", 2, 600, presets=presets)
    assert ranks[0] == ranks[1], "all ranks report the same numbers"
    for preset, result in zip(presets, ranks[0], strict=True):
        config = load_config(preset).config
        assert len(result["losses"]) == 3, preset
        assert all(math.isfinite(value) for value in [*result["losses"], *result["norms"]]), preset
        assert result["losses"][2] < result["losses"][0], f"{preset}: one repeated batch must be learnt"
        assert result["ep_size"] == min(2, config.parallel.ep_size), preset
        assert result["zero_stage"] == config.parallel.zero_stage == 3, preset
        assert result["layers"] == config.model.recurrent_layers, preset
        assert result["changes"] > 0, preset
