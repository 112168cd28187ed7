"""Rows that leave the loop before others: each is what it would be alone at its count, for every form of the block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from mythos_hf.configuration_mythos import MythosConfig
from mythos_hf.experts_mythos import MythosMoE
from mythos_hf.recurrent_mythos import MythosRecurrentBlock, add_norms, residual
from mythos_vllm.row_loops import RowLoops, at_rows, count_rows, running_rows

COUNTS = [1, 1, 3, 2, 2, 2, 4]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"lora_rank": 0},
    "LoRA of the input": {"lora_rank": 3},
    "LoRA of the output": {"lora_rank": 3, "lora_target": "output"},
    "no loop embedding": {"loop_embedding": "none"},
    "raw loop embedding": {"loop_embedding": "raw"},
    "injection after": {"injection": "post"},
    "injection after, zero-order hold, from the embedding": {
        "injection": "post", "discretisation": "zoh", "initial_state": "embedding", "lora_rank": 3,
        "lora_target": "output",
    },
    "direct": {"discretisation": "direct", "initial_state": "embedding"},
    "state in bf16": {"state_dtype": "bfloat16"},
    "norms after": {"norm_placement": "after", "lora_rank": 3},
}  # fmt: skip


class Layer(nn.Module):
    """The experts after a sum over the row itself, in place of attention; notes how many rows the experts see."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        add_norms(self, config)
        self.self_attn, self.mlp = nn.Linear(config.hidden_size, config.hidden_size), MythosMoE(config)
        self.seen: list[int] = []

    def forward(self, x: Tensor, loop: int, rows: Tensor | None) -> Tensor:
        def mix(x: Tensor, loop: int) -> Tensor:
            self.seen.append(len(x))
            return self.mlp(x, loop)

        return residual(self, x, self.self_attn, lambda x: at_rows(mix, x, rows, loop))


class Whole(MythosRecurrentBlock):
    """The block as it is, for rows that all run alike."""

    def run_layers(self, x: Tensor, loop: int, context: Any) -> tuple[Tensor, list[Tensor]]:
        for layer in self.layers:
            x = layer(x, loop, None)
        return x, []


class ByRow(RowLoops):
    """The block for rows with counts of their own."""

    def run_layers(self, x: Tensor, loop: int, context: Any) -> tuple[Tensor, list[Tensor]]:
        for layer in self.layers:
            x = layer(x, loop, context[1][loop])
        return x, []


def blocks(changes: dict[str, Any]) -> tuple[Any, Any]:
    """Both, with the same weights, none of which is zero."""
    config = MythosConfig(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_recurrent_layers=2, **changes
    )
    torch.manual_seed(0)
    whole, by_row = (kind(config, [Layer(config) for _ in range(2)]) for kind in (Whole, ByRow))
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    by_row.load_state_dict(whole.state_dict())
    return whole, by_row


@pytest.mark.parametrize("form", FORMS)
def test_each_row_is_what_it_is_alone_at_its_count(form: str) -> None:
    whole, by_row = blocks(FORMS[form])
    e = torch.randn(len(COUNTS), 16, generator=torch.Generator().manual_seed(1))
    rows = running_rows(torch.tensor(COUNTS), 6, len(e), e.device)
    with torch.inference_mode():
        out = by_row(e, len(rows), (None, rows))
        alone = torch.cat([whole(e[i : i + 1], count, None) for i, count in enumerate(COUNTS)])
        other = torch.cat([whole(e[i : i + 1], count + 1, None) for i, count in enumerate(COUNTS)])
    assert (out - alone).abs().max() <= 1e-5
    assert ((out - other).abs().amax(1) > 1e-3).all()
    # Loops that no row runs are left out, and experts see the rows that run alone.
    assert [layer.seen for layer in by_row.layers] == [[7, 5, 2, 1]] * 2


def test_rows_that_all_run_alike_are_not_gathered() -> None:
    assert running_rows(None, 3, 5, torch.device("cpu")) == [None] * 3
    assert running_rows(torch.tensor([2, 2]), 3, 2, torch.device("cpu")) == [None] * 2
    x = torch.randn(4, 2)
    assert at_rows(lambda x, loop: x, x, None, 0) is x


def test_rows_that_fill_a_batch_run_in_no_loop() -> None:
    rows = running_rows(torch.tensor([1, 2]), 3, 4, torch.device("cpu"))
    assert [some.tolist() for some in rows if some is not None] == [[0, 1], [1]]


def test_counts_are_spread_over_the_tokens_of_each_request() -> None:
    counts = count_rows([2, 4, 1], [3, 1, 2], 4)
    assert counts is not None
    assert counts.tolist() == [2, 2, 2, 4, 1, 1]
    assert count_rows([4, 4], [3, 1], 4) is None
