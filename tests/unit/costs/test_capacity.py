"""Tokens of a server's cache: by hand, and the page and the command that say them."""

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.capacity import LEAST_TOKENS, divisions, serving_capacity, smallest_server
from mythos_ds.costs.serving import Division, rank_weight_bytes
from mythos_ds.hardware import GPUS
from tests.helpers.mains import load_main
from tests.helpers.pretrain import ROOT

capacity = load_main("tools/capacity.py")
H200, H100 = GPUS["h200"], GPUS["h100"]


def model_of(name: str) -> ModelConfig:
    return load_config(f"{name}.json").config.model


def test_tokens_by_hand() -> None:
    """1t in fp8, tensor parallel 8 on two nodes: 0.92 x 141 GB less 6 GB and weights, over 136 slots of 1,152 bytes."""
    model, division = model_of("1t"), Division(8, 2)
    made = serving_capacity(model, H200, division, fp8=True)
    room = 0.92 * 141e9 - 6e9 - rank_weight_bytes(model, division, fp8=True)
    assert made.room == pytest.approx(room)
    assert made.replica_tokens(16) == int(room // (136 * 1152))
    assert made.tokens(64) == 2 * int(room // ((8 + 64 * 8) * 1152))
    assert 1000e9 / 16 < made.weights < 1000e9 / 16 * 1.05, "a byte a parameter, and little beside"


def test_what_does_not_fit_holds_no_token() -> None:
    made = serving_capacity(model_of("1t"), H100, Division(8), fp8=False)
    assert made.room < 0
    assert made.tokens(1) == 0


def test_divisions_are_tensor_parallel_inside_a_node() -> None:
    assert divisions(model_of("1t"), H200, 16, fp8=True) == [
        Division(8, 2),
        Division(4, 4),
        Division(2, 8),
        Division(1, 16),
    ]
    assert divisions(model_of("50b"), H200, 8, fp8=True) == [Division(1, 8)]
    assert divisions(model_of("10b"), H200, 8, fp8=True) == []


@pytest.mark.parametrize("name", ["10b", "50b", "100b", "500b", "1t"])
@pytest.mark.parametrize("gpu", [H100, H200])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_smallest_server_is_the_smallest(name, gpu, fp8) -> None:
    model = model_of(name)
    made = smallest_server(model, gpu, fp8=fp8)
    assert bool(made) == (not fp8 or name != "10b")
    for one in made:
        assert one.replica_tokens(model.mean_recurrence) >= LEAST_TOKENS
        assert one.division.gpus == made[0].division.gpus
    if made and (half := made[0].division.gpus // 2):
        fewer = [serving_capacity(model, gpu, one, fp8=fp8) for one in divisions(model, gpu, half, fp8=fp8)]
        assert all(one.replica_tokens(model.mean_recurrence) < LEAST_TOKENS for one in fewer)


def test_the_page_is_current() -> None:
    page = ROOT / "docs" / "capacity.md"
    assert page.read_text(encoding="utf-8") == capacity.build_page(), "python tools/capacity.py --page"


def _main(arguments: list[str]) -> int:
    return capacity.run_tool(capacity.parser(), capacity.work, arguments)


def test_the_command_says_it_for_a_configuration_and_a_folder(capsys) -> None:
    assert _main(["--config", "100b.json", "--gpus", "16", "--dtype", "fp8", "--loops", "8", "32"]) == 0
    said = capsys.readouterr().out
    assert "62,208 bytes per token at 8 loops" in said
    assert [line.split()[1:4] for line in said.splitlines() if line.startswith("16 ")] == [
        [str(size), "x", str(16 // size)] for size in (8, 4, 2, 1)
    ]
    assert _main(["--model", "tiny", "--gpu", "h100", "--gpus", "2", "--share", "0.5", "--reserve", "0"]) == 0
    assert "40 GB" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--gpu=h100", "--gpus=4", "--dtype=fp8", "--loops=3", "--share=0.8", "--reserve=2"])
def test_every_option_has_an_effect(option, capsys) -> None:
    _main(["--config", "100b.json"])
    before = capsys.readouterr().out
    assert _main(["--config", "100b.json", option]) == 0
    assert capsys.readouterr().out != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12"], "--gpus: given 12; allowed: divisors and multiples of 8; nearest: 8"),
        (["--gpus", "0"], "--gpus: given 0"),
        (["--share", "1.5"], "--share: given 1.5; allowed: 0 < number <= 1; nearest: 1"),
        (["--reserve", "141"], "--reserve: given 141"),
        (["--loops", "4", "0"], "--loops: given 0"),
        (["--gpu", "h300"], "--gpu: given h300; allowed: h100, h200"),
    ],
)
def test_wrong_input_is_one_message(arguments, message, capsys) -> None:
    assert _main(["--config", "1t.json", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_fits_no_rank_is_refused_with_the_matrix(capsys) -> None:
    assert _main(["--config", "10b.json", "--dtype", "fp8"]) == 2
    assert "no tensor-parallel size fits (1: 992 rows of mlp.shared_experts.gate_proj" in capsys.readouterr().err
    assert _main(["--page", "--gpus", "8"]) == 2
    assert "--gpus: given with --page" in capsys.readouterr().err
