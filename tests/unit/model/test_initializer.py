"""First weights: sizes that do not depend on the width, and values keyed by name alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from tests.helpers.toy_model import GQA, MLA, toy_batch, toy_config

WIDTHS = (128, 256, 512, 1024)
ZERO_AT_START = ("attn.o.weight", ".w2", ".w2.weight", "lora.up.weight", "loop_embedding.gain", "halting.weight")


def state_rms(dim: int, n_loops: int, *, awake: bool, **changes: Any) -> list[float]:
    """Root mean square of h after each loop; `awake` gives the zero output projections the size of the others."""
    config = toy_config(
        dim=dim, n_heads=dim // 32, n_kv_heads=dim // 32, head_dim=32, ffn_dim=dim, expert_dim=dim // 2,
        recurrent_layers=1, n_experts=4, max_loops=16, mean_recurrence=8, **changes,
    )  # fmt: skip
    model = MythosModel(config)
    if awake:
        with torch.no_grad():
            for parameter in model.recurrent.layers.parameters():
                if not parameter.any():
                    parameter.normal_(0, config.resolved_init_std)
    records = ForwardRecords(details=True)
    with torch.no_grad():
        model(toy_batch(config)["tokens"], n_loops=n_loops, records=records)
    return [records.loops[loop].state_rms.item() for loop in range(n_loops)]


@pytest.mark.parametrize("injection", ["pre", "post"])
def test_first_state_size_does_not_depend_on_the_width(injection: str) -> None:
    sizes = torch.tensor([state_rms(dim, 16, awake=False, injection=injection) for dim in WIDTHS])
    # Only the linear part acts: h_T = g (1 - A^T)/(1 - A) e with rms(e) = 1 and g = dt; "post" also adds the layers'
    # output, which is their normed input.
    decay, gain = 5**-0.5, 0.805 + (injection == "post")
    expected = gain * (1 - decay ** torch.arange(1, 17)) / (1 - decay)
    assert torch.allclose(sizes, expected.expand_as(sizes), rtol=1e-2)


def test_state_stays_bounded_once_the_layers_act() -> None:
    sizes = torch.tensor([state_rms(dim, 16, awake=True) for dim in WIDTHS])
    assert sizes.isfinite().all()
    assert (sizes > 0.5).all()
    assert (sizes < 5).all()
    assert (sizes.amax(0) / sizes.amin(0) < 1.3).all(), "across widths"
    assert (sizes[:, -1] / sizes[:, 7] < 1.1).all(), "twice the loops, no larger state"


def test_first_loss_is_that_of_guessing() -> None:
    config = toy_config(dim=128)
    loss = MythosModel(config)(**toy_batch(config), n_loops=4)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(float(config.vocab_size))).item(), abs=0.6)


def weights(seed: int = 0, **arguments: Any) -> dict[str, Tensor]:
    changes = arguments.pop("changes", {})
    return MythosModel(toy_config(**changes), seed=seed, **arguments).state_dict()


def test_same_weights_whatever_the_checkpointing() -> None:
    plain, checkpointed = weights(activation_checkpointing="none"), weights(activation_checkpointing="loop")
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_global_generators_do_not_matter() -> None:
    torch.manual_seed(1)
    first = weights()
    torch.manual_seed(2)
    assert all(torch.equal(value, first[name]) for name, value in weights().items())
    other = weights(seed=1)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_a_tensor_depends_on_its_own_name_only() -> None:
    small = weights()
    large = weights(changes={"recurrent_layers": 3, "prelude_layers": 2, "n_experts": 16, "halting": "act", **GQA})
    for name, value in small.items():
        if ".moe.router." in name or name.endswith("loop_bias"):
            continue  # their shape is another
        if ".experts." in name:
            assert torch.equal(large[name][:8], value), name
        else:
            assert torch.equal(large[name], value), name
    assert not torch.equal(large["prelude.0.attn.q.weight"], large["prelude.1.attn.q.weight"])
    assert not torch.equal(small["recurrent.layers.0.moe.experts.w1"], small["recurrent.layers.1.moe.experts.w1"])


def test_experts_are_keyed_by_their_global_number() -> None:
    init = Initializer(4).at("recurrent").at("layers").at(0).at("moe").at("experts")
    whole = Experts(8, 16, 12, init, 0.1)
    half = Experts(4, 16, 12, init, 0.1, first_expert=4)
    assert torch.equal(whole.w1[4:], half.w1)
    assert torch.equal(whole.w3[4:], half.w3)
    assert not torch.equal(whole.w1, whole.w3)
    assert len({row.sum().item() for row in whole.w1}) == 8, "no two experts alike"


class UpperHalf(MoE):
    """Holds the second half of the experts, as a rank of expert parallelism would."""

    def make_experts(self, config: ModelConfig, init: Initializer) -> Experts:
        half = config.n_experts // 2
        return Experts(half, config.dim, config.expert_dim, init, config.resolved_init_std, first_expert=half)


def test_same_weights_whatever_the_factory() -> None:
    whole, part = weights(), weights(moe_factory=UpperHalf)
    assert whole.keys() == part.keys()
    for name, value in part.items():
        assert torch.equal(value, whole[name][4:] if ".experts." in name else whole[name]), name


@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
def test_standard_deviations(attention: dict[str, Any]) -> None:
    config = toy_config(**attention, dim=128, halting="act", embedding_std=0.03, vocab_size=500)
    for name, value in MythosModel(config).named_parameters():
        if name.endswith(ZERO_AT_START):
            assert not value.any(), name
        elif value.dim() >= 2 and not name.endswith("lora.scale"):
            std = 0.03 if name == "embed.weight" else (2 / (5 * 128)) ** 0.5
            # Five standard errors of an estimated standard deviation.
            assert value.std().item() == pytest.approx(std, rel=5 / (2 * value.numel()) ** 0.5), name
            assert abs(value.mean().item()) < 5 * std / value.numel() ** 0.5, name
        elif name.endswith(("norm.weight", "lora.scale", "injection.B")):
            assert (value == 1).all(), name
        else:
            assert name.endswith(("log_A", "dt_bias", "halting.bias")), f"{name} is not covered"


def test_records_are_closed_after_the_forward() -> None:
    config = toy_config()
    model = MythosModel(config, activation_checkpointing="loop")
    records, tokens = ForwardRecords(details=True), toy_batch(config)["tokens"]
    loss = model(tokens, n_loops=2, targets=tokens, records=records)
    noted = {layer: dict(own) for layer, own in records.routing.items()}
    assert sorted(records.loops) == [0, 1]
    assert [sorted(own) for own in noted.values()] == [[0, 1]] * config.recurrent_layers
    loss.backward()
    recomputed = records.routing
    assert all(recomputed[layer][loop] is own[loop] for layer, own in noted.items() for loop in own), "written twice"
