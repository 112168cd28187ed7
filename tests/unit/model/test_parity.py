"""The model against an independent reference written from the formulas: logits, loss and every gradient."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from mythos_ds.config.schema import RopeScaling
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from tests.helpers.reference import ReferenceTrainer, forward, reference_logits, reference_loss
from tests.helpers.toy_model import MLA, randomise, toy_batch, toy_config

LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=12
)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=10, beta_fast=4.0)
OLMO = {"qk_norm": True, "qk_norm_span": "all", "norm_placement": "after"}
ACT: dict[str, Any] = {"halting": "act", "act_threshold": 0.8}
CASES: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "gqa": ({}, 4, None),
    "one_loop": ({}, 1, None),
    "deeper_than_trained": ({}, 9, None),
    "truncated": ({}, 5, 2),
    "more_gradient_than_loops": ({}, 2, 4),
    "qk_norm_interleaved": ({"qk_norm": True, "rope_interleaved": True, "rope_theta": 500.0}, 3, None),
    "biases": ({"attention_biases": "qkv"}, 3, None),
    "all_biases": ({"attention_biases": "all", "qk_norm": True}, 3, None),
    "norms_after": (OLMO, 4, 2),
    "norms_after_mla_act": ({**ACT, **MLA, "norm_placement": "after"}, 4, None),
    "norms_after_post": ({**OLMO, "injection": "post"}, 3, None),
    "linear_rope": ({"rope_scaling": RopeScaling(rope_type="linear", factor=3.0)}, 3, None),
    "llama3_rope": ({"rope_scaling": LLAMA3, "rope_theta": 50.0}, 3, None),
    "yarn_rope": ({"rope_scaling": YARN, "rope_theta": 50.0, "rope_interleaved": True}, 3, None),
    "no_rope": ({"no_rope_layers": (0, 2, 4), "prelude_layers": 2}, 3, None),
    "mla": (MLA, 4, 2),
    "mla_full_query": ({**MLA, "q_lora_rank": None}, 3, None),
    "mla_interleaved": ({**MLA, "rope_interleaved": True}, 3, None),
    "mla_wide_values": ({**MLA, "v_head_dim": 14}, 3, None),
    "post": ({"injection": "post", "lora_target": "output"}, 4, 2),
    "post_lora_input": ({"injection": "post", "loop_embedding": "none"}, 3, None),
    "pre_lora_output": ({"lora_target": "output", "discretisation": "zoh"}, 4, None),
    "zoh_no_identity": ({"discretisation": "zoh", "loop_embedding": "none", "lora_rank": 0}, 4, None),
    "softmax": ({"router_score": "softmax", "route_scale": 2.5}, 3, None),
    "groups": ({"n_expert_groups": 4, "n_limited_groups": 2, "n_experts_per_tok": 3}, 3, None),
    "no_shared": ({"n_shared_experts": 0, "coda_layers": 0}, 3, None),
    "two_shared": ({"n_shared_experts": 2, "shared_expert_dim": 7}, 3, None),
    "tied_from_e": ({"tie_embeddings": True, "initial_state": "embedding", "prelude_norm": False}, 3, 2),
    "act": (ACT, 5, None),
    "act_mla_truncated": ({**ACT, **MLA}, 6, 3),
    "act_post": ({**ACT, "injection": "post"}, 4, None),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_equal_the_reference(name: str) -> None:
    changes, n_loops, n_grad_loops = CASES[name]
    config = toy_config(**changes)
    model = randomise(MythosModel(config, seed=3))
    batch = toy_batch(config)
    tokens, positions = batch["tokens"], batch["positions"]
    params = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    buffers = {name: value.double() for name, value in model.named_buffers()}

    expected = reference_logits(params, config, tokens, n_loops, n_grad_loops, positions, buffers)
    with torch.no_grad():
        logits = model(tokens, n_loops=n_loops, positions=positions)
    assert (logits - expected).abs().max() <= 1e-5

    cross_entropy, total = reference_loss(
        params, config, **batch, n_loops=n_loops, n_grad_loops=n_grad_loops, router_bias=buffers,
        balance=0.3, z=0.02, ponder=0.1,
    )  # fmt: skip
    (total / 2).backward()
    aux = AuxLoss(balance=0.3, z=0.02, ponder=0.1, scale=0.5)
    loss = model(**batch, n_loops=n_loops, n_grad_loops=n_grad_loops, aux=aux)
    (loss / 2).backward()
    assert abs(loss - cross_entropy) <= 1e-6 * cross_entropy
    for name, parameter in model.named_parameters():
        want, got = params[name].grad, parameter.grad
        assert want is not None, name
        assert got is not None, name
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9, name


@pytest.mark.parametrize("name", ["gqa", "groups", "act", "act_mla_truncated"])
def test_counts_equal_the_reference(name: str) -> None:
    changes, n_loops, _ = CASES[name]
    config = toy_config(**changes)
    model = randomise(MythosModel(config, seed=3))
    batch = toy_batch(config)
    params: dict[str, torch.Tensor] = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    _, out = forward(params, config, batch["tokens"], n_loops, None, batch["positions"], buffers)
    records = ForwardRecords()
    model(**batch, n_loops=n_loops, records=records)
    for index in range(config.recurrent_layers):
        assert sorted(records.routing[index]) == list(range(n_loops))
        counts = torch.stack([records.routing[index][loop].counts for loop in range(n_loops)])
        assert torch.equal(counts, torch.stack(out.counts[index]))
        if name == "act":
            assert 0 < counts[-1].sum() < counts[0].sum(), "some positions halt before the last loop, some do not"


def test_positions_default_to_one_document() -> None:
    config = toy_config()
    model = randomise(MythosModel(config))
    tokens = toy_batch(config)["tokens"]
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    with torch.no_grad():
        assert torch.allclose(model(tokens, n_loops=3), model(tokens, n_loops=3, positions=positions), atol=1e-6)


def test_documents_do_not_see_each_other() -> None:
    config = toy_config(**MLA)
    model = randomise(MythosModel(config))
    batch = toy_batch(config)
    changed = batch["tokens"].clone()
    changed[0, :7] = (changed[0, :7] + 1) % config.vocab_size
    with torch.no_grad():
        first = model(batch["tokens"], n_loops=3, positions=batch["positions"])
        second = model(changed, n_loops=3, positions=batch["positions"])
    assert not torch.allclose(first[0, :7], second[0, :7], atol=1e-3)
    assert torch.allclose(first[0, 7:], second[0, 7:], atol=1e-6)


def test_halted_positions_keep_their_state() -> None:
    config = toy_config(**ACT)
    model = randomise(MythosModel(config))
    batch = toy_batch(config)
    assert model.recurrent.halting is not None
    with torch.no_grad():
        model.recurrent.halting.bias.fill_(20.0)  # every position halts after the first loop
    records = ForwardRecords(details=True)
    with torch.no_grad():
        shallow = model(batch["tokens"], n_loops=1, positions=batch["positions"])
        deep = model(batch["tokens"], n_loops=4, positions=batch["positions"], records=records)
    assert torch.equal(shallow, deep)
    assert [records.loops[loop].residual.item() for loop in (1, 2, 3)] == [0, 0, 0]
    assert [own[1].counts.sum().item() for own in records.routing.values()] == [0, 0]


@pytest.mark.parametrize(("n_loops", "n_grad_loops"), [(0, None), (-1, None), (3, 0)])
def test_loop_counts_below_one_are_refused(n_loops: int, n_grad_loops: int | None) -> None:
    config = toy_config()
    with pytest.raises(ValueError, match="at least 1"):
        MythosModel(config)(toy_batch(config)["tokens"], n_loops=n_loops, n_grad_loops=n_grad_loops)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_steps_equal_the_reference(optimizer: str) -> None:
    config = toy_config(**MLA)
    model = randomise(MythosModel(config, activation_checkpointing="loop"))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    trainer = ReferenceTrainer(
        dict(model.named_parameters()), config, optimizer=optimizer, eps=1e-6, weight_decay=0.1, grad_clip=0.5,
        decays=lambda name: "experts" in name, lr_scale=lambda name: 0.5 if "attn" in name else 1.0,
        balance=0.3, z=0.02, router_bias=buffers,
    )  # fmt: skip
    groups = [
        {
            "params": [value],
            "weight_decay": 0.1 if "experts" in name else 0.0,
            "scale": 0.5 if "attn" in name else 1.0,
        }
        for name, value in model.named_parameters()
    ]
    ours = torch.optim.SGD(groups, 0.0) if optimizer == "sgd" else torch.optim.AdamW(groups, 0.0, (0.9, 0.95), 1e-6)
    for step, n_loops in enumerate((3, 1, 4)):
        batches = [toy_batch(config, seed=10 * step + i) for i in range(2)]
        lr = 0.1 if optimizer == "sgd" else 3e-3
        loss, norm = trainer.step(batches, n_loops, 2, lr)
        ours.zero_grad()
        aux = AuxLoss(balance=0.3, z=0.02, scale=0.5)
        counts = torch.zeros(n_loops, config.n_experts)
        own_loss = 0.0
        for batch in batches:
            records = ForwardRecords()
            part = model(**batch, n_loops=n_loops, n_grad_loops=2, aux=aux, records=records) / 2
            part.backward()
            own_loss += part.item()
            counts += torch.stack([records.routing[0][loop].counts for loop in range(n_loops)])
        own_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        for group in ours.param_groups:
            group["lr"] = lr * group["scale"]
        ours.step()
        assert own_norm > 0.5, "clipping acts"
        assert own_loss == pytest.approx(loss, rel=1e-6)
        assert own_norm == pytest.approx(norm, rel=1e-5)
        assert torch.equal(trainer.counts[0], counts)
    for name, value in model.named_parameters():
        assert (value - trainer.params[name]).abs().max() <= 1e-5, name


def test_labels_are_the_tokens_themselves_and_shifted_inside() -> None:
    config = toy_config()
    model, tokens = randomise(MythosModel(config)), toy_batch(config)["tokens"]
    logits = model(tokens)
    assert torch.equal(logits, model(tokens, n_loops=config.mean_recurrence)), "the mean is the default"
    labels = tokens.clone()
    labels[0, 5:] = -100
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss = model(tokens, labels=labels)
    assert torch.allclose(loss, expected, atol=1e-6)
    assert not torch.allclose(loss, model(tokens, labels=tokens), atol=1e-4), "what is ignored would count"
    shifted = torch.autograd.grad(model(tokens, labels=tokens), model.embed.weight)[0]
    want = functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(shifted, torch.autograd.grad(want, model.embed.weight)[0], atol=1e-6)


def test_labels_beside_targets_are_refused() -> None:
    config = toy_config()
    tokens = toy_batch(config)["tokens"]
    with pytest.raises(ValueError, match="both labels and targets"):
        MythosModel(config)(tokens, labels=tokens, targets=tokens)
