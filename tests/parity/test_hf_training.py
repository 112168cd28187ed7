"""What trainers need of the exported model: gradients with activations computed again, and experts read back."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
from transformers import DynamicCache

from mythos_ds.plan.live_bytes import LiveBytes
from mythos_hf import MythosConfig, MythosForCausalLM
from tests.parity.test_hf import CONFIGURATIONS, exported

TOKENS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
STACKS = ("gate_up_proj", "down_proj")


def gradients(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(TOKENS, labels=TOKENS, **options)
    loss = out.loss
    if out.hidden_states is not None:
        loss = loss + sum(state.square().mean() for state in (*out.hidden_states, *out.loop_states))
    if out.attentions is not None:
        loss = loss + sum(weights.square().mean() for weights in out.attentions)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["latent", "post, zero-order hold", "bf16 state"])
def test_gradients_are_those_without_checkpointing(name, tmp_path):
    _, model = exported(tmp_path, CONFIGURATIONS[name])
    model.train().set_attn_implementation("eager")
    for changes in ({"n_loops": 5}, {"n_loops": 2, "output_hidden_states": True, "output_attentions": True}):
        # Recomputing goes without a cache, whose keys lie otherwise in memory: of them products round otherwise.
        options = {**changes, "use_cache": False}
        expected = gradients(model, **options)
        for reentrant, limit in ((False, 0.0), (True, 1e-6)):  # a reentrant piece's backward adds up in another order
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
            found = gradients(model, **options)
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                assert (found[key] - gradient).norm() <= limit * gradient.norm(), (key, reentrant)
        model.gradient_checkpointing_disable()
        again = gradients(model, **options)
        assert all(torch.equal(again[key], gradient) for key, gradient in expected.items())


def deep_model(**changes: Any) -> MythosForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "lora_rank": 4}
    return MythosForCausalLM(MythosConfig(**{**sizes, "num_recurrent_layers": 2, **changes})).train()


def held(model: MythosForCausalLM, n_loops: int) -> tuple[int, int]:
    """Bytes alive after a forward and at most during forward and backward, weights and gradients aside."""
    tokens = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes(existing=False) as memory:
        memory.ignore(*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))
        loss = model(tokens, labels=tokens, n_loops=n_loops).loss
        after = memory.now
        loss.backward()
    return after, memory.peak


def test_checkpointing_keeps_one_state_of_a_loop():
    model = deep_model()
    plain = {loops: held(model, loops) for loops in (4, 16)}
    state = 4 * 2 * 64 * 64  # bytes of h
    assert plain[16][0] - plain[4][0] > 12 * 20 * state
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        less = {loops: held(model, loops) for loops in (4, 16)}
        assert less[16][0] - less[4][0] <= 12 * 1.1 * state
        assert less[16][1] < plain[16][1] / 4
        assert less[4][1] < plain[4][1] / 1.5


def test_every_n_layers_counts_prelude_layers_loops_and_coda_layers():
    model = deep_model(num_prelude_layers=2, num_coda_layers=2, num_recurrent_layers=1)
    again: list[str] = []
    parts = {f"prelude.{i}": layer for i, layer in enumerate(model.model.prelude)}
    parts |= {f"coda.{i}": layer for i, layer in enumerate(model.model.coda)}
    parts["loop"] = model.model.recurrent.layers[0]
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: again.append(name))
    model.gradient_checkpointing_enable(every_n_layers=3)
    loss = model(TOKENS, labels=TOKENS, n_loops=5).loss
    forward = len(again)
    loss.backward()
    # Nine parts: prelude 0 and 1, loops 2 to 6, coda 7 and 8. Computed again are 6, 3 and 0, last ones first.
    assert again[forward:] == ["loop", "loop", "prelude.0"]


def test_a_cache_is_refused_where_activations_are_computed_again_and_serves_where_none_are():
    model = deep_model()
    expected = model.eval().generate(TOKENS, max_new_tokens=4, do_sample=False, use_cache=False)
    model.train().gradient_checkpointing_enable()
    for given in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="given with gradient checkpointing"):
            model(TOKENS, **given)
    out = model(TOKENS, labels=TOKENS)
    assert list(out.keys()) == ["loss", "logits"]
    assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), expected)  # without gradients


def test_mixed_precision_leaves_the_choice_of_experts_in_fp32():
    model = deep_model()
    seen: list[tuple[torch.Tensor, ...]] = []
    router = model.model.recurrent.layers[0].mlp.router
    router.register_forward_hook(lambda _module, given, out: seen.append((given[0], *out)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(TOKENS, labels=TOKENS, n_loops=3).loss
    assert len(seen) == 3
    for loop, (x, indices, weights) in enumerate(list(seen)):
        expected = router(x.float(), loop)
        assert torch.equal(indices, expected[0])
        assert torch.equal(weights, expected[1])
    assert loss.item() == pytest.approx(model(TOKENS, labels=TOKENS, n_loops=3).loss.item(), rel=0.01)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and its tensors as files hold them."""
    folder = tmp_path_factory.mktemp("saved")
    model = deep_model(num_recurrent_layers=1)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def test_experts_one_by_one_are_read_whole_or_in_parts(saved):
    model, files = saved
    names = sorted(name for name in files if ".mlp.experts." in name)
    assert len(names) == 16 * 3
    assert not any(name.endswith(STACKS) for name in names)
    fresh = deep_model(num_recurrent_layers=1)
    for parameter in fresh.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    other = copy.deepcopy(fresh)
    assert str(fresh.load_state_dict(files)) == "<All keys matched successfully>"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())
    for half in (names[:20], names[20:]):  # as of two files, the first of which ends inside of an expert
        other.load_state_dict({name: files[name] for name in half}, strict=False)
    stacks = model.model.recurrent.layers[0].mlp.experts
    for name in STACKS:
        assert torch.equal(getattr(other.model.recurrent.layers[0].mlp.experts, name), getattr(stacks, name))
    with torch.device("meta"):
        empty = MythosForCausalLM(model.config)
    empty.load_state_dict(files, assign=True)
    assert torch.equal(empty.model.recurrent.layers[0].mlp.experts.down_proj, stacks.down_proj)
    fused = model.state_dict()
    assert str(deep_model(num_recurrent_layers=1).load_state_dict(fused)) == "<All keys matched successfully>"


def test_an_expert_that_is_missing_or_misshapen_is_named(saved):
    model, files = saved
    name = "model.recurrent.layers.0.mlp.experts.5.up_proj.weight"
    with pytest.raises(RuntimeError, match=name):
        model.load_state_dict({key: value for key, value in files.items() if key != name})
    with pytest.raises(RuntimeError, match=rf"{name}: given \[3, 4\]; allowed: \[32, 64\]"):
        model.load_state_dict({**files, name: torch.zeros(3, 4)})
    with pytest.raises(RuntimeError, match=r"experts\.16\.up_proj"):
        model.load_state_dict({**files, name.replace(".5.", ".16."): files[name]})
