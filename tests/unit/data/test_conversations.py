"""Conversations prepared, packed and read: what is stored beside the tokens, and which samples a run gets of them."""

import json
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from mythos_ds.config.schema import IGNORED_LABEL, DataConfig, TrainingConfig
from mythos_ds.data.batches import BatchStream
from mythos_ds.data.chat import ChatTemplate
from mythos_ds.data.chat_rows import conversation_of
from mythos_ds.data.dataset_info import read_info
from mythos_ds.data.datasets import build_datasets, prepare_index_cache
from mythos_ds.data.packing import best_fit
from mythos_ds.data.parts import unfinished_folder
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.token_files import open_ids, open_lengths, open_mask
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.validation import held_out
from mythos_ds.data.verification import data_faults
from mythos_ds.errors import DamagedDatasetError, DataError
from tests.helpers.chats import CHATML, THINKING, conversations, rows_of
from tests.helpers.text_data import make_dataset, make_texts
from tests.helpers.tokenizers import byte_level_folder

pytest.importorskip("transformers")

CHATS = conversations(90)
SEQ = 256


def rows(chats, start=0):
    return [conversation_of(rows_of(chat, number), f"line {number}") for number, chat in enumerate(chats, start=start)]


def prepare(place, prefix, chats=CHATS, template=CHATML, **options):
    options = {"shuffle_seed": None, **options}
    given = rows(chats) if isinstance(chats, list) else chats
    return prepare_dataset(given, tokenizer_path=place, prefix=prefix, chat=True, chat_template=template, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer"), added=True)


@pytest.fixture(scope="module")
def prepared(place, tmp_path_factory):
    """A dataset, and what its conversations are in ids, with which of them count."""
    prefix = tmp_path_factory.mktemp("data") / "chats"
    prepare(place, prefix)
    template = ChatTemplate(Tokenizer.load(place), CHATML)
    return prefix, [template.encode_answers(json.loads(row.text)["messages"]) for row in rows(CHATS)]


def settings(prefix, place, data_dir, **options):
    datasets = options.pop("datasets", [{"prefix": str(prefix)}])
    fields = {"datasets": datasets, "tokenizer": str(place), "data_dir": str(data_dir), "split": [80, 20, 0]}
    return DataConfig.model_validate({**fields, **options})


def opened(config, place, **options):
    size = Tokenizer.load(place).vocab_size
    request = {"seq_len": SEQ, "train_samples": 60, "valid_samples": 8, "seed": 3, "vocab_size": size, **options}
    prepare_index_cache(config, **request)
    return build_datasets(config, **request)


def test_what_is_stored(prepared):
    prefix, expected = prepared
    info = read_info(prefix)
    lengths, ids, mask = open_lengths(prefix), open_ids(prefix, info), open_mask(prefix, info)
    assert lengths.tolist() == [len(chat.ids) for chat in expected]
    assert ids.tolist() == [number for chat in expected for number in chat.ids]
    assert mask.tolist() == [int(counts) for chat in expected for counts in chat.answers]
    assert info.counted_tokens == int(mask.sum()) > 0
    assert (info.chat_template, info.turn_ends) == (CHATML, (2,))


@pytest.mark.parametrize("lost", [("mask_sha256",), ("chat_template",), ("mask_sha256", "chat_template")])
def test_conversations_are_never_read_as_text(prepared, tmp_path, lost):
    """Where the facts that make them conversations are lost."""
    for path in prepared[0].parent.glob(f"{prepared[0].name}.*"):
        (tmp_path / f"chats{path.suffix}").write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "chats.json").read_text())
    kept = {key: value for key, value in content.items() if key not in lost}
    (tmp_path / "chats.json").write_text(json.dumps(kept))
    with pytest.raises(DamagedDatasetError, match=f"chats.json: .*given and no {', '.join(lost)}; .* prepare it again"):
        read_info(tmp_path / "chats")


def test_ends_of_answers_are_found_before_white_space(place, tmp_path):
    """As of a template that marks the whole turn, with the line's end after it."""
    marked = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n"
        "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endgeneration %}{% else %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    )
    end = Tokenizer.load(place).special_tokens["<|im_end|>"]
    assert prepare(place, tmp_path / "marked", template=marked).turn_ends == (end,)
    content = marked.replace("{{ m['content'] }}<|im_end|>{{ '\n' }}{% endgen", "{{ m['content'] }}{% endgen")
    assert prepare(place, tmp_path / "content", template=content).turn_ends == ()


def test_order_and_workers(place, prepared, tmp_path):
    """Shuffled tokens go with their flags; processes and parts that were taken over give the same files."""
    _, expected = prepared
    info = prepare(place, tmp_path / "shuffled", shuffle_seed=0)
    ids, mask = open_ids(tmp_path / "shuffled", info), open_mask(tmp_path / "shuffled", info)
    ends = np.cumsum(open_lengths(tmp_path / "shuffled"))
    found = [(i.tolist(), m.tolist()) for i, m in zip(np.split(ids, ends), np.split(mask, ends), strict=True)][:-1]
    given = [(chat.ids, [int(counts) for counts in chat.answers]) for chat in expected]
    assert found != given
    assert sorted(found) == sorted(given)
    again = prepare(place, tmp_path / "workers", shuffle_seed=0, workers=2)
    assert again == info
    assert (tmp_path / "workers.mask").read_bytes() == (tmp_path / "shuffled.mask").read_bytes()


def test_a_template_of_another_conversation_is_a_bad_row(place, tmp_path):
    refusing = CHATML + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    long = sum(len(chat) > 2 for chat in CHATS)
    with pytest.raises(DataError, match=rf"{long} bad rows.*not a conversation for the chat template") as error:
        prepare(place, tmp_path / "out", template=refusing)
    assert "line 0: not a conversation" in str(error.value)
    assert "(too long)" in str(error.value)
    assert not (tmp_path / "out.bin").exists()
    info = prepare(place, tmp_path / "out", template=refusing, skip_bad_rows=True)
    assert (info.documents, info.bad_rows) == (len(CHATS) - long, long)
    again = prepare(place, tmp_path / "out", template=refusing, skip_bad_rows=True, overwrite=True)
    assert again == info
    with pytest.raises(DataError, match=r"no conversation to prepare: \d+ rows read"):
        prepare(place, tmp_path / "none", [chat for chat in CHATS if len(chat) > 2], refusing, skip_bad_rows=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_at_fault_is_one_error(place, tmp_path, workers):
    for skip in (False, True):
        with pytest.raises(DataError, match=r"its chat template is at fault: Expected an expression[^\n]*; mend it$"):
            prepare(place, tmp_path / "out", template="{% for %}", workers=workers, skip_bad_rows=skip)


def test_finished_parts_are_those_of_one_template(place, tmp_path):
    def broken():
        yield from rows(CHATS)
        raise DataError("line 91 is damaged")

    for template in (CHATML, CHATML.replace("brief", "long")):
        with pytest.raises(DataError, match="damaged"):
            prepare(place, tmp_path / "out", broken(), template)
    whole = prepare(place, tmp_path / "out")
    assert whole == prepare(place, tmp_path / "other")
    assert not unfinished_folder(tmp_path / "out").exists()


def test_text_takes_the_place_of_conversations(place, tmp_path):
    prepare(place, tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"):
        prepare(place, tmp_path / "out")
    texts = ["some words"] * 3
    info = prepare_dataset(texts, tokenizer_path=place, prefix=tmp_path / "out", overwrite=True)
    assert not info.is_chat
    assert not (tmp_path / "out.mask").exists()
    assert "mask_sha256" not in json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.mask").write_bytes(b"somebody's own")
    prepare_dataset(texts, tokenizer_path=place, prefix=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.mask").read_bytes() == b"somebody's own"


def test_damage_is_found(prepared, place, tmp_path):
    for file in prepared[0].parent.glob("chats.*"):
        shutil.copy(file, tmp_path)
    prefix, path = tmp_path / "chats", tmp_path / "chats.mask"
    assert data_faults(path, full=True) == {str(prefix): []}
    content = path.read_bytes()
    place_of_one = content.index(1)
    for damaged, said in (
        (content[:-1], "is damaged or of another run"),
        (content.replace(b"\1", b"\2", 1), "2 for token"),
        (content[:place_of_one] + b"\0" + content[place_of_one + 1 :], "mask_sha256"),
    ):
        path.write_bytes(damaged)
        [[fault]] = data_faults(prefix, full=True).values()
        assert said in fault
        with pytest.raises(DataError, match=said):
            opened(settings(prefix, place, tmp_path / "index"), place)
    with pytest.raises(DataError, match=r"prepare-data INPUT --chat --output"):
        opened(settings(prefix, place, tmp_path / "index"), place)
    other = byte_level_folder(tmp_path / "other")
    with pytest.raises(DataError, match=r"prepare-data INPUT --chat --tokenizer"):
        opened(settings(prefix, other, tmp_path / "index"), other)
    path.unlink()
    with pytest.raises(DataError, match=r"chats.mask is missing"):
        opened(settings(prefix, place, tmp_path / "index"), place)


def spans_of(sample):
    """(tokens, targets) of each conversation in a sample, without the padding."""
    starts = np.flatnonzero(sample["positions"] == 0).tolist()
    parts = zip(starts, [*starts[1:], len(sample["tokens"])], strict=True)
    return [(sample["tokens"][a:b].tolist(), sample["targets"][a:b].tolist()) for a, b in parts]


def expected_span(chat, length=SEQ):
    targets = [
        number if counts else IGNORED_LABEL for number, counts in zip(chat.ids[1:], chat.answers[1:], strict=True)
    ]
    return chat.ids[:-1][:length], targets[:length]


def test_samples_hold_whole_conversations_once_per_pass(prepared, place, tmp_path):
    prefix, chats = prepared
    data = opened(settings(prefix, place, tmp_path), place, train_samples=130)
    train, valid = chats[: round(0.8 * len(chats))], chats[round(0.8 * len(chats)) :]
    wanted = Counter(map(str, map(expected_span, train)))
    seen, passes = Counter[str](), 0
    for number in range(len(data.train)):
        sample = data.train[number]
        assert {name: value.shape for name, value in sample.items()} == {
            "tokens": (SEQ,), "targets": (SEQ,), "positions": (SEQ,), "counted": (),
        }  # fmt: skip
        assert int(sample["counted"]) == int((sample["targets"] != IGNORED_LABEL).sum()) > 0
        for tokens, targets in spans_of(sample):
            if any(target != IGNORED_LABEL for target in targets):
                seen[str((tokens, targets))] += 1
            else:
                assert len(set(tokens)) == 1, "padding"
        if sum(seen.values()) == len(train) * (passes + 1):
            passes += 1
            assert seen == Counter({span: count * passes for span, count in wanted.items()})
    assert passes >= 2
    held = {str(expected_span(chat)) for chat in valid}
    assert {str(span) for span in spans_of(data.valid[0]) if set(span[1]) != {IGNORED_LABEL}} <= held


def test_order_is_a_function_of_seed_and_number(prepared, place, tmp_path):
    prefix, _ = prepared

    def tokens(folder, count=60, **options):
        train = opened(settings(prefix, place, tmp_path / folder), place, **options).train
        return np.stack([train[number]["tokens"] for number in range(count)])

    first = tokens("a")
    assert (first == tokens("b")).all()
    assert (first[:20] == tokens("c", 20, train_samples=20)).all(), "whatever the number of samples"
    assert (first != tokens("d", seed=4)).any()
    data = opened(settings(prefix, place, tmp_path / "a"), place).train
    alone = BatchStream(data, start_sample=8, micro_batch_size=4, dp_rank=0, dp_size=1)
    second = BatchStream(data, start_sample=8, micro_batch_size=2, dp_rank=1, dp_size=2)
    for one, two in islice(zip(alone, second, strict=False), 5):
        assert (one["tokens"][2:] == two["tokens"]).all()
        assert one["counted"].tolist()[2:] == two["counted"].tolist()


def test_longer_conversations(prepared, place, tmp_path, caplog):
    """They end where the sequence does; those of which no answer is left are left out, and both are said."""
    prefix, chats = prepared
    lengths = sorted(len(chat.ids) for chat in chats)
    seq = lengths[len(lengths) // 4]
    kept = [chat for chat in chats if any(chat.answers[1 : seq + 1])]
    assert 0 < len(kept) < len(chats)
    with caplog.at_level("INFO", logger="mythos_ds"):
        config = settings(prefix, place, tmp_path, split=[1, 0, 0])
        data = opened(config, place, seq_len=seq, train_samples=len(kept), valid_samples=0)
    longer = sum(len(chat.ids) > seq + 1 for chat in kept)
    assert f"{longer:,} longer ones cut" in caplog.text
    assert f"{len(chats) - len(kept):,} left out" in caplog.text
    wanted = {str(expected_span(chat, seq)) for chat in kept}
    found = {str(span) for n in range(len(data.train)) for span in spans_of(data.train[n])}
    assert wanted <= found
    with pytest.raises(DataError, match="no train conversation"):
        opened(config, place, seq_len=2, train_samples=4, valid_samples=0)


def test_masks_that_are_asked_for(prepared, place, tmp_path, caplog):
    prefix, _ = prepared
    tokenizer = Tokenizer.load(place)
    make_dataset(tmp_path / "text", tokenizer, make_texts(20))
    text = {"prefix": str(tmp_path / "text")}
    with pytest.raises(DataError, match=r"data.loss_mask: true given, but .*text is text"):
        opened(settings(prefix, place, tmp_path, datasets=[{"prefix": str(prefix)}, text], loss_mask=True), place)
    with pytest.raises(DataError, match=r"data.loss_mask: false given, but no dataset has a mask"):
        opened(settings(prefix, place, tmp_path, datasets=[text], loss_mask=False), place)
    prepare(place, tmp_path / "other", template=THINKING)
    both = [{"prefix": str(prefix)}, {"prefix": str(tmp_path / "other")}]
    with pytest.raises(DataError, match="different chat templates"):
        opened(settings(prefix, place, tmp_path, datasets=both), place)
    with caplog.at_level("INFO", logger="mythos_ds"):
        every = opened(settings(prefix, place, tmp_path, loss_mask=False), place)
    assert "every token of the conversations counts" in caplog.text
    some = opened(settings(prefix, place, tmp_path, loss_mask=True), place)
    assert some.identity["conversations"]["ends"] == [2]
    assert some.identity != every.identity
    used = (every.train[0]["targets"] != IGNORED_LABEL).sum()
    assert used > 2 * (some.train[0]["targets"] != IGNORED_LABEL).sum() > 0


def test_conversations_blend_with_text(prepared, place, tmp_path):
    prefix, _ = prepared
    make_dataset(tmp_path / "text", Tokenizer.load(place), make_texts(60))
    datasets = [{"prefix": str(prefix)}, {"prefix": str(tmp_path / "text"), "weight": 3.0}]
    train = opened(settings(prefix, place, tmp_path, datasets=datasets), place).train
    whole = [int(train[number]["counted"]) == SEQ for number in range(60)]
    assert 40 <= sum(whole) <= 50, "three of four samples are text, of which every target counts"


@pytest.mark.parametrize("weights", [(1, 9), (9, 1)])
def test_one_dataset_twice(prepared, place, tmp_path, weights):
    """Each has an index of its own, of as many samples as its weight asks for."""
    prefix, _ = prepared
    datasets = [{"prefix": str(prefix), "weight": weight} for weight in weights]
    twice = opened(settings(prefix, place, tmp_path, datasets=datasets, validation=datasets), place)
    opened(settings(prefix, place, tmp_path, datasets=datasets, validation=datasets), place)
    once = opened(settings(prefix, place, tmp_path, validation=datasets[:1]), place)
    found, known = ({once_.tobytes() for once_ in _tokens(part)} for part in (twice.train, once.train))
    assert found <= known
    assert len(_tokens(twice.valid)) == 8


def _tokens(samples):
    return [samples[number]["tokens"] for number in range(len(samples))]


def test_without_document_mask_positions_go_on(prepared, place, tmp_path):
    prefix, _ = prepared
    data = opened(settings(prefix, place, tmp_path, document_mask=False), place)
    assert data.train[0]["positions"].tolist() == list(range(SEQ))


def test_index_of_other_numbers_is_refused(prepared, place, tmp_path):
    prefix, _ = prepared
    config = settings(prefix, place, tmp_path)
    opened(config, place)
    [file] = tmp_path.glob("index/*/train-*-conversations.npy")
    numbers = np.load(file)
    numbers[3] = 10_000
    np.save(file, numbers)
    with pytest.raises(DataError, match="its content is not what was written"):
        opened(config, place)


def test_held_out_text_is_what_sequences_take(prepared, place, tmp_path):
    prefix, chats = prepared
    training = TrainingConfig(seq_len=64, micro_batch_size=1, global_batch_size=1, max_steps=1, lr=1.0, eval_batches=2)
    found = held_out(settings(prefix, place, tmp_path), training, exact=True)
    assert found is not None
    assert found.tokens == sum(min(len(chat.ids) - 1, 64) for chat in chats[round(0.8 * len(chats)) :])


@pytest.mark.parametrize("capacity", [10, 100])
def test_best_fit(capacity):
    """Against the rule written out: every size goes to the fullest bin that has room."""
    sizes = np.random.Generator(np.random.Philox(1)).integers(1, 11, 200)
    left: list[int] = []
    held: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        fitting = [n for n in range(len(left)) if left[n] >= sizes[place]]
        if not fitting:
            left.append(capacity)
            held.append([])
            fitting = [len(left) - 1]
        tightest = min(left[n] for n in fitting)
        chosen = [n for n in fitting if left[n] == tightest]
        left[chosen[0]] -= int(sizes[place])
        held[chosen[0]].append(place)
    found = best_fit(sizes, capacity)
    assert sorted(n for numbers in found for n in numbers.tolist()) == list(range(len(sizes)))
    assert Counter(int(sizes[n].sum()) for n in found) == Counter(capacity - room for room in left)
