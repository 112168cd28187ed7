"""The depth curve's law on known curves, and the report from end to end."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.analysis import depth_curve
from mythos_ds.errors import LabError
from mythos_ds.lab.studies.language import base, configuration
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import save_model
from tests.helpers.mains import load_main
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

main = load_main("tools/loop_report.py").main

SMALL = {**base("cpu"), "model.mean_recurrence": 2, "model.n_experts": 4}
LOOPS = depth_curve.depths_up_to(4)


def _model(vocab: int = 4096, **changes: object) -> MythosModel:
    config = configuration(SMALL).model.model_copy(update={"vocab_size": vocab, **changes})
    model = MythosModel(config, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_depths_reach_eight_times_the_trained_one() -> None:
    assert LOOPS == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert depth_curve.depths_up_to(5)[-2:] == [32, 40]
    assert len(depth_curve.depths_up_to(1)) >= depth_curve.MIN_POINTS


@pytest.mark.parametrize(("level", "scale", "rate"), [(2.5, 1.2, 0.4), (3.0, -0.5, 0.05), (1.0, 4.0, 2.0)])
def test_a_saturating_exponential_is_found(level: float, scale: float, rate: float) -> None:
    found = depth_curve.fit(LOOPS, [level + scale * math.exp(-rate * n) for n in LOOPS])
    assert (found["L_inf"], found["Z"], found["z"]) == pytest.approx((level, scale, rate), rel=1e-3)
    assert found["largest_held_out_error"] < 1e-3
    assert not found["too_flat"]
    assert not found["rate_at_bound"]


def test_what_the_law_does_not_explain_shows() -> None:
    bowl = [3.0 + 0.3 * (math.log(n) - 1.5) ** 2 for n in LOOPS]
    assert depth_curve.fit(LOOPS, bowl)["held_out_share"] > 0.1
    assert depth_curve.fit(LOOPS, [2.0 + 1e-3 * (-1) ** n for n in range(len(LOOPS))], noise=0.01)["too_flat"]
    with pytest.raises(LabError, match="at least 6"):
        depth_curve.fit([1, 2, 3, 4, 8], [1.0] * 5)


def test_losses_are_those_of_the_forward() -> None:
    model = _model(50)
    tokens = torch.arange(40).view(2, 20)
    batch = {"tokens": tokens, "targets": tokens + 1, "positions": torch.arange(20).expand(2, -1)}
    found = depth_curve.measure(model, [batch, {**batch, "tokens": tokens + 2}])
    with torch.no_grad():
        two = [float(model(tokens + shift, n_loops=6, targets=tokens + 1)) for shift in (0, 2)]
    assert found["loss"][found["loops"].index(6)] == pytest.approx(sum(two) / 2, rel=1e-6)
    assert found["noise"] > 0
    assert found["ppl_ratio"] == pytest.approx(math.exp(found["loss"][3] - found["loss"][1]))  # loops 4 and 2
    assert depth_curve.measure(model, [batch])["noise"] is None
    with pytest.raises(LabError, match="given 3"):
        depth_curve.measure(model, [batch], loops=[1, 2])


def _report(tmp_path: Path, checkpoint: Path, *more: str) -> tuple[int, Path]:
    output = tmp_path / "report"
    sizes = ("--batches", "2", "--seq-len", "24", "--data-dir", str(tmp_path / "data"))
    return main(["--checkpoint", str(checkpoint), "--output", str(output), *sizes, *more]), output


def test_a_text_model_is_reported_on_held_out_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    corpus = tmp_path / "data" / "builtin"
    corpus.mkdir(parents=True)
    make_dataset(corpus / "tokens", make_tokenizer(corpus), make_texts(60))
    save_model(_model(), tmp_path / "m", {})
    code, output = _report(tmp_path, tmp_path / "m")
    assert code == 0
    content = json.loads((output / "report.json").read_text())
    assert content.keys() == {"facts", "stability", "depth_curve", "routing", "halting"}
    assert "assumed" in content["facts"]["tokens"]
    text = (output / "report.md").read_text()
    for name in ("stability", "depth_curve", "routing", "halting"):
        assert f"]({name}.png)" in text
        assert (output / f"{name}.png").stat().st_size > 1000


def test_openmythos_weights_are_reported_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    oracle = pytest.importorskip("open_mythos.main")
    source = oracle.MythosConfig(
        vocab_size=61, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=32, max_loop_iters=2, prelude_layers=1,
        coda_layers=1, attn_type="gqa", n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=8, lora_rank=4,
    )  # fmt: skip
    weights, config = tmp_path / "w.pt", tmp_path / "c.json"
    torch.save(oracle.OpenMythos(source).state_dict(), weights)
    config.write_text(json.dumps(dataclasses.asdict(source)))
    code, output = _report(tmp_path, weights, "--openmythos-config", str(config))
    assert code == 0
    text = (output / "report.md").read_text()
    assert "random tokens" in text
    assert "Not measured: exit rules are for models without ACT" in text


def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(_model(50), tmp_path / "m", {})
    broken, config, empty = (tmp_path / name for name in ("b.pt", "c.json", "e.json"))
    broken.write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    fields = {"vocab_size": 61, "dim": 32, "attn_type": "gqa", "n_kv_heads": 2}
    config.write_text(json.dumps({**_openmythos_fields(), **fields}))
    empty.write_text("{}")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path / "none",), "config.json"),
        ((tmp_path / "m", "--batches", "0"), "--batches: given 0"),
        ((tmp_path / "m", "--seq-len", "1"), "nearest: 2"),
        ((tmp_path / "m", "--output", str(config)), "--output: given"),
        ((tmp_path / "m", "--openmythos-config", str(config)), "state_dict file only"),
        ((broken,), "--openmythos-config: missing"),
        ((broken, "--openmythos-config", str(empty)), "vocab_size is missing"),
        ((broken, "--openmythos-config", str(config)), "damaged"),
        ((tmp_path / "list.pt", "--openmythos-config", str(config)), "not a state_dict"),
    ]
    for arguments, message in cases:
        code, output = _report(tmp_path, *arguments)
        assert (code, output.exists()) == (2, False), arguments
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1, error


def _openmythos_fields() -> dict[str, object]:
    attention = {"n_heads": 4, "rope_theta": 1e4}
    layers = {"prelude_layers": 1, "coda_layers": 1, "max_loop_iters": 2, "lora_rank": 4, "act_threshold": 0.9}
    experts = {"n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 8, "n_shared_experts": 1}
    return {**attention, **layers, **experts}
