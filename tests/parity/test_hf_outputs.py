"""What the exported model hands on beside logits: hidden states, attentions, tuples; and its padded batches."""

import logging
from typing import Any

import pytest
import torch
from torch.nn import functional

transformers = pytest.importorskip("transformers")
import mythos_hf
from mythos_hf.rotary_mythos import rotary_tables
from tests.parity.test_hf import CONFIGURATIONS, exported

TOKENS = torch.randint(10, 60, (2, 11), generator=torch.Generator().manual_seed(2))
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model(tiny):
    return mythos_hf.MythosForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", ["latent", "post, zero-order hold", "no shared expert, no coda", "bf16 state"])
def test_hidden_states_are_those_of_the_training_model_in_their_order(name, tmp_path):
    ours, theirs = exported(tmp_path, CONFIGURATIONS[name])
    config, loops = theirs.config, 5
    with torch.no_grad():
        out = theirs(TOKENS, n_loops=loops, output_hidden_states=True)
        e, context = ours.encode(TOKENS)
        h = ours.recurrent.start(e, context)
        states = []
        for loop in range(loops):
            h, _ = ours.step_loop(h, e, loop=loop, context=context)
            states.append(h.float())
        embedded = ours.embed(TOKENS)
    blocks = loops * config.num_recurrent_layers
    assert len(out.hidden_states) == 1 + config.num_prelude_layers + blocks + config.num_coda_layers
    assert torch.equal(out.hidden_states[0], embedded)
    assert [state.shape for state in out.loop_states] == [h.shape] * loops
    for found, expected in zip(out.loop_states, states, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    if config.injection == "pre" and config.lora_target == "input":  # then h is what the block's last layer gives
        last = [out.hidden_states[config.num_prelude_layers + config.num_recurrent_layers * t] for t in range(1, loops)]
        for found, state in zip(last, out.loop_states, strict=False):
            assert (found - state).abs().max() <= 0.01 * state.abs().max()  # the state may be rounded to bf16
    assert torch.equal(theirs.lm_head(out.hidden_states[-1]).float(), out.logits)


def test_each_layer_s_output_is_there_once(model):
    seen: list[torch.Tensor] = []
    layers = [*model.model.prelude, *model.model.recurrent.layers, *model.model.coda]
    hooks = [layer.register_forward_hook(lambda _module, _given, out: seen.append(out[0])) for layer in layers]
    with torch.no_grad():
        out = model.model(TOKENS, n_loops=3, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(out.attentions) == len(out.hidden_states) - 1 == 5
    assert all(torch.equal(state, layer) for state, layer in zip(out.hidden_states[1:-1], seen[:-1], strict=True))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(out.hidden_states[-1], model.model.norm(seen[-1]))


def test_attentions_are_the_weights_of_each_layer(model, tiny):
    with torch.no_grad():
        out = model(TOKENS, n_loops=2, output_attentions=True)
        x = model.model.embed_tokens(TOKENS)
        layer, tables = model.model.prelude[0], rotary_tables(torch.arange(11)[None], model.config)
        q, k, _ = layer.self_attn._grouped(layer.input_layernorm(x), tables)
    k = k.repeat_interleave(model.config.num_attention_heads // model.config.num_key_value_heads, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    expected = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), float("-inf")).softmax(-1)
    assert (out.attentions[0] - expected).abs().max() <= 1e-6
    assert len(out.attentions) == 4
    assert all(weights.shape == (2, model.config.num_attention_heads, 11, 11) for weights in out.attentions)
    plain = mythos_hf.MythosForCausalLM.from_pretrained(tiny, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="output_attentions: given True with attn_implementation 'sdpa'"):
        plain(TOKENS, output_attentions=True)


def test_the_configuration_asks_for_all_of_it_too(tiny):
    asked = mythos_hf.MythosForCausalLM.from_pretrained(
        tiny, attn_implementation="eager", output_hidden_states=True, output_attentions=True, return_dict=False
    ).eval()
    with torch.no_grad():
        loss, logits, cache, hidden, attentions, loops = asked(TOKENS, labels=TOKENS)
        named = asked(TOKENS, labels=TOKENS, return_dict=True)
        none = asked(TOKENS, return_dict=True, output_hidden_states=False, output_attentions=False)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert cache.get_seq_length() == TOKENS.shape[1]
    assert (len(hidden), len(attentions), len(loops)) == (7, 6, 4)
    assert torch.equal(named.hidden_states[3], hidden[3])
    assert none.hidden_states is none.attentions is none.loop_states is None
    assert len(asked.model(TOKENS)) == 5  # of the model without its head


@pytest.mark.parametrize("loops", [None, 2, 7])
def test_generation_hands_them_on(loops, model):
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        out = model.generate(TOKENS, **GREEDY, **options, n_loops=loops)
        depth = (loops or 4) + 2
        assert [len(step) for step in out.hidden_states] == [depth + 1] * 5
        assert [len(step) for step in out.attentions] == [depth] * 5
        assert torch.equal(out.sequences, model.generate(TOKENS, **GREEDY, n_loops=loops, use_cache=False))
        whole = model(out.sequences, n_loops=loops, output_hidden_states=True)
    for place, step in enumerate(out.hidden_states[1:], TOKENS.shape[1]):
        assert (step[3][:, 0] - whole.hidden_states[3][:, place]).abs().max() <= 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(side, attention, tiny):
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny, attn_implementation=attention).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny, padding_side=side)
    texts = ["def main(", "import os\n\nprint(os.getcwd())", "x"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    first = batch.attention_mask.cumsum(1) == 1  # nothing of the row's own says what it is
    labels = batch.input_ids.masked_fill((batch.attention_mask == 0) | first, -100)
    together = model(**batch, labels=labels)
    assert torch.isfinite(together.loss)
    losses, items = 0.0, 0
    for row, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        logits = model(alone).logits[0]
        kept = together.logits[row][batch.attention_mask[row].bool()]
        assert (kept - logits).abs().max() <= 1e-4, text
        losses += functional.cross_entropy(logits[:-1], alone[0, 1:], reduction="sum").item()
        items += len(logits) - 1
    assert together.loss.item() == pytest.approx(losses / items, rel=1e-4)
    together.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_generating_batches_warns_of_nothing(tiny, tmp_path, caplog, monkeypatch):
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id == 3
    batch = tokenizer(["def main(", "x"], return_tensors="pt", padding=True, add_special_tokens=False)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        for loops in (None, 2, 9):
            model.generate(**batch, **GREEDY, n_loops=loops)
            model.generate(**batch, **GREEDY, n_loops=loops, cache_implementation="static")
    assert [record.message for record in caplog.records] == []


def test_a_forward_is_one_graph(tiny):
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny).eval()
    assert (model.config._experts_implementation, model.config._attn_implementation) == ("grouped_mm", "sdpa")
    options = {"n_loops": 2, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        out = torch.compile(model, backend="eager", fullgraph=True)(TOKENS, **options)
        assert torch.equal(out.logits, model(TOKENS, **options).logits)
