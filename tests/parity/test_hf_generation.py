"""Every way by which transformers generates says what the model says without a cache."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import CausalLMOutputWithPast

import mythos_hf

FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
TEXTS = ["def main(", "The function returns", "import os\n", "class A:\n    "]
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
LOOPS: list[dict[str, Any]] = [{}, {"n_loops": 1}, {"n_loops": 8}]


@pytest.fixture(scope="module")
def model(tiny):
    return mythos_hf.MythosForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return transformers.AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def padded(tokenizer):
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, add_special_tokens=False)
    assert (batch.attention_mask[:, 0] == 0).any()
    assert batch.attention_mask[:, -1].all()
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_cached_is_uncached_in_left_padded_batches(search, loops, model, padded):
    cached = model.generate(**padded, **GREEDY, **search, **loops)
    assert torch.equal(cached, model.generate(**padded, **GREEDY, **search, **loops, use_cache=False))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("loops", [{}, {"n_loops": 1}, {"n_loops": 3}, {"n_loops": 9}])
def test_a_cache_by_name_has_the_entries_of_the_loops_that_are_asked_for(loops, kind, model, padded):
    expected = model.generate(**padded, **GREEDY, **loops, use_cache=False)
    made = model.generate(**padded, **GREEDY, **loops, cache_implementation=kind, return_dict_in_generate=True)
    assert torch.equal(made.sequences, expected)
    assert len(made[FIELD]) == 2 + loops.get("n_loops", 4)
    assert model.config.n_loops == 4
    assert torch.equal(model.generate(**padded, **GREEDY, use_cache=False), model.generate(**padded, **GREEDY))


@pytest.mark.parametrize("kind", ["StaticCache", "DynamicCache"])
def test_a_given_cache_serves_as_many_loops_as_its_configuration_has(kind, model, tiny, padded):
    def made(**loops: Any) -> Any:
        config = mythos_hf.MythosConfig.from_pretrained(tiny, **loops)
        return getattr(transformers, kind)(config=config, **({"max_cache_len": 40} if kind == "StaticCache" else {}))

    for loops in LOOPS:
        expected = model.generate(**padded, **GREEDY, **loops, use_cache=False)
        assert torch.equal(model.generate(**padded, **GREEDY, **loops, cache=made(n_loops=8)), expected)
    small = made()
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=f"given a {kind} with 6 entries; allowed: 10 or more for n_loops=8"):
            call(padded["input_ids"], cache=small, n_loops=8)
    assert small.get_seq_length() == 0
    assert model(padded["input_ids"], cache=small).logits.shape[1] == padded["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["StaticCache", "DynamicCache", "grows"])
def test_a_cache_that_fewer_loops_filled_does_not_go_on_with_more(kind, model, tiny):
    config = mythos_hf.MythosConfig.from_pretrained(tiny, n_loops=8)
    length = {"max_cache_len": 40} if kind == "StaticCache" else {}
    cache = transformers.DynamicCache() if kind == "grows" else getattr(transformers, kind)(config=config, **length)
    tokens = torch.tensor([[5, 77, 312]])
    with torch.no_grad():
        model(tokens, cache=cache, n_loops=2)
        with pytest.raises(ValueError, match="given one with 3 tokens, and 0 in the entries of loop 6"):
            model(tokens[:, :1], cache=cache, n_loops=6)
        again = model(tokens[:, :1], cache=cache, n_loops=2).logits
        whole = model(torch.cat([tokens, tokens[:, :1]], dim=1), use_cache=False, n_loops=2).logits
    assert (again[:, -1] - whole[:, -1]).abs().max() <= 1e-4


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("draft", ["one loop", "prompt lookup"])
def test_assisted_decoding_gives_the_same(draft, loops, model, tiny, tokenizer):
    shallow = mythos_hf.MythosForCausalLM.from_pretrained(tiny, n_loops=1).eval()
    help_ = {"assistant_model": shallow} if draft == "one loop" else {"prompt_lookup_num_tokens": 3}
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        expected = model.generate(tokens, **GREEDY, **loops, use_cache=False)
        assert torch.equal(model.generate(tokens, **GREEDY, **loops, **help_), expected)


def test_a_pipeline_gives_the_same(model, tiny, tokenizer):
    generator = transformers.pipeline("text-generation", model=str(tiny), tokenizer=tokenizer)
    for loops in LOOPS:
        made = generator(TEXTS, batch_size=2, add_special_tokens=False, return_full_text=False, **GREEDY, **loops)
        for text, (answer,) in zip(TEXTS, made, strict=True):
            tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            expected = model.generate(tokens, **GREEDY, **loops, use_cache=False)[0, tokens.shape[1] :]
            assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True), (text, loops)


def test_generation_from_embeddings_gives_the_same(model, padded):
    embedded = model.get_input_embeddings()(padded["input_ids"])
    made = model.generate(inputs_embeds=embedded, attention_mask=padded["attention_mask"], **GREEDY)
    assert torch.equal(made, model.generate(**padded, **GREEDY, use_cache=False)[:, padded["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_either_name_and_comes_back_by_the_version_s(name, model):
    tokens = torch.randint(10, 4000, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        whole = model(tokens, use_cache=False)
        assert FIELD not in whole
        start = model(tokens[:, :6])
        assert list(start.keys()) == ["logits", FIELD]
        rest = model(tokens[:, 6:], **{name: start[FIELD]})
        assert rest[FIELD] is start[FIELD]
        assert (rest.logits - whole.logits[:, 6:]).abs().max() <= 1e-4
        base = model.model(tokens[:, :6], n_loops=7)
        assert list(base.keys()) == ["last_hidden_state", FIELD]
        rest = model.model(tokens[:, 6:], n_loops=7, **{name: base[FIELD]})
        hidden = model.model(tokens, n_loops=7).last_hidden_state[:, 6:]
        assert (rest.last_hidden_state - hidden).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("loops", LOOPS)
def test_generation_goes_on_from_a_cache_by_either_name(name, loops, model):
    tokens = torch.tensor([[5, 77, 312, 2044]])
    start = model.generate(tokens, **GREEDY, **loops, return_dict_in_generate=True)
    assert FIELD in start
    held = start[FIELD].get_seq_length()
    more = model.generate(start.sequences, **GREEDY, **loops, **{name: start[FIELD]})
    assert start[FIELD].get_seq_length() > held
    assert torch.equal(more, model.generate(start.sequences, **GREEDY, **loops, use_cache=False))


def test_two_caches_are_refused_and_one_given_twice_is_one(model):
    tokens = torch.tensor([[5, 77, 312]])
    first, second = transformers.DynamicCache(), transformers.DynamicCache()
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values: given two caches"):
            call(tokens, cache=first, past_key_values=second)
        assert first.get_seq_length() == second.get_seq_length() == 0
    model(tokens, cache=first, past_key_values=first)
    assert first.get_seq_length() == 3
    model.generate(tokens, max_new_tokens=2, cache=second, past_key_values=second)
    assert second.get_seq_length() >= 4


def test_packed_sequences_do_not_see_each_other(model):
    parts = [torch.randint(10, 4000, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 5, 9)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with torch.inference_mode():
        packed = model(torch.cat(parts, 1), position_ids=positions).logits
        alone = torch.cat([model(part).logits for part in parts], 1)
        assert (packed - alone).abs().max() <= 1e-4
        assert (model(torch.cat(parts, 1)).logits - alone).abs().max() > 1e-2


def test_outputs_are_tuples_where_that_is_asked_for(model):
    tokens = torch.tensor([[5, 77, 312]])
    with torch.inference_mode():
        named = model(tokens, labels=tokens)
        loss, logits, cache = model(tokens, labels=tokens, return_dict=False)
        assert torch.equal(loss, named.loss)
        assert torch.equal(logits, named.logits)
        assert cache.get_seq_length() == 3
        hidden, _ = model.model(tokens, return_dict=False)
        assert torch.equal(hidden, model.model(tokens).last_hidden_state)
