"""Files as people have them: every format in every compression and encoding gives the same documents, and every
damage of one is told with the file and the place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mythos_ds.data.inputs import find_inputs
from mythos_ds.data.json_rows import array_elements
from mythos_ds.data.readers import ReadOptions, limited, read_rows
from mythos_ds.data.rows import STOP_AFTER, BadRow, BadRows, LongText, Row, whole_texts
from mythos_ds.errors import DataError

TEXTS = [
    "first document\n",
    "second\n\nwith, a blank\tline",
    "",
    'a "quote" {[,]}',
    "naïve 你好 \U0001f642 \u2028 \\ \\\\",
    "z",
]


def zstd(content):
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": n, key: text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(texts))


def table(texts, delimiter):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue()


FORMATS: dict[str, Callable[[list[str]], str]] = {
    ".jsonl": jsonl,
    ".ndjson": lambda texts: jsonl(texts).replace("\n", "\r\n"),
    ".json": lambda texts: json.dumps([{"text": text, "more": [1, {"a": []}]} for text in texts]),
    ".csv": lambda texts: table(texts, ","),
    ".tsv": lambda texts: table(texts, "\t"),
}


def rows_of(path, **options):
    return list(read_rows([path], ReadOptions(**options)))


def bad_of(path, **options):
    return [row for row in rows_of(path, **options) if isinstance(row, BadRow)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_in_every_compression(tmp_path, ending, compression, mark):
    path = tmp_path / f"docs{ending.upper()}{compression}"
    path.write_bytes(COMPRESSIONS[compression](mark + FORMATS[ending](TEXTS).encode()))
    assert rows_of(path) == TEXTS
    renamed = path.rename(tmp_path / f"docs{ending}")  # what holds is what is in it
    assert rows_of(renamed) == TEXTS


@pytest.mark.parametrize("compression", [ending for ending in COMPRESSIONS if ending])
def test_parts_that_were_put_together_each_with_its_mark(tmp_path, compression):
    parts = [b"\xef\xbb\xbf" + jsonl([text]).encode() for text in TEXTS]
    compressed = b"".join(COMPRESSIONS[compression](part) for part in parts)
    (tmp_path / f"a.jsonl{compression}").write_bytes(compressed)
    (tmp_path / "b.jsonl").write_bytes(b"".join(parts))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert rows_of(tmp_path / f"a.jsonl{compression}") == rows_of(tmp_path / "b.jsonl") == TEXTS
    assert rows_of(tmp_path / "c.txt") == ["one\ntwo\n"]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("compression", [ending for ending in COMPRESSIONS if ending])
def test_damaged_compression_is_told_and_never_a_document(tmp_path, compression, seed):
    generator = random.Random(seed)
    texts = [f"{generator.getrandbits(256):064x}" for _ in range(2000)]
    whole = bytearray(COMPRESSIONS[compression](jsonl(texts).encode()))
    place = generator.randrange(8, len(whole) - 16)
    if seed % 2 and compression != ".zst":  # whose checksums pyarrow does not write
        whole[place : place + 8] = bytes(generator.getrandbits(8) for _ in range(8))
    else:
        del whole[place:]
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(whole)
    *rows, last = rows_of(path)
    assert isinstance(last, BadRow)
    assert last.damage or rows == texts[: len(rows)]
    assert "a.jsonl" in str(last)
    bad = BadRows(skip=True)
    bad.add(BadRow("a", "the file is damaged", damage=True))
    with pytest.raises(DataError, match="leaves out rows, not damaged files"):
        bad.check(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "gb18030", "utf-8-sig"])
@pytest.mark.parametrize("ending", [*FORMATS, ".txt"])
def test_other_encodings_are_read_when_they_are_named(tmp_path, ending, encoding):
    texts = ["plain", "one\ntwo", "x é" if "1" in encoding else "x"]
    path = tmp_path / f"a{ending}"
    content = FORMATS[ending](texts) if ending in FORMATS else "".join(texts)
    path.write_bytes(content.encode(encoding))
    assert rows_of(path, encoding=encoding) == (texts if ending in FORMATS else ["".join(texts)])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("ending", [*FORMATS, ".txt"])
def test_wide_encodings_are_told_by_name(tmp_path, ending, encoding):
    path = tmp_path / f"a{ending}"
    path.write_bytes("text,é".encode(encoding))
    with pytest.raises(DataError, match=rf"is {encoding.upper()} text.*--encoding {encoding}.*iconv"):
        rows_of(path)


@pytest.mark.parametrize("name", ["klingon", "", "\0", "rot13", "base64", "utf-99", "punycode", "idna"])
def test_unknown_encodings(tmp_path, name):
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(DataError, match="--encoding"):
        rows_of(tmp_path / "a.txt", encoding=name)


# In utf-7 a table's first line alone is of no encoding, and is told as another column.
@pytest.mark.parametrize(
    ("ending", "encoding"),
    [
        (ending, encoding)
        for ending in [*FORMATS, ".txt"]
        for encoding in ("utf-16", "utf-32", "utf-7")
        if (ending, encoding) not in ((".csv", "utf-7"), (".tsv", "utf-7"))
    ],
)
def test_text_that_is_not_of_the_encoding_that_was_given(tmp_path, ending, encoding):
    path = tmp_path / f"a{ending}"
    path.write_bytes("text,é +\xff\n".encode("latin-1") * 4)
    found = bad_of(path, encoding=encoding)
    assert found
    assert all("encoding" in str(row) for row in found)


DEEP = 5000
BAD_LINES = {
    "null": (b'{"text": null}', "field 'text' is null, text is needed"),
    "number": (b'{"text": 3}', "field 'text' is int"),
    "list": (b'{"text": ["a"]}', "field 'text' is list"),
    "missing": (b'{"body": "a"}', "no field 'text'; allowed for --key: 'body'"),
    "many keys": (json.dumps({f"key {n}": n for n in range(500)}).encode(), r"'key 9', \.\.\.$"),
    "no object": (b"[1]", "a JSON object is needed, list given"),
    "text alone": (b'"a"', "a JSON object is needed, str given"),
    "cut": (b'{"text": "a', "not JSON"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "not JSON; Extra data"),
    "words": (b"hello", "not JSON"),
    "latin-1": (b'{"text": "na\xefve"}', "not readable as UTF-8 text; byte 0xef at byte 12"),
    "zeros": (b"\0\0\0\0", "not JSON"),
    "long number": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON"),
    "deep list": (b'{"text": "a", "m": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested beyond 200 levels"),
    "deep object": (b'{"text": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}", "nested beyond 200 levels"),
    "open lists": (b"[" * 100_000, "nested beyond 200 levels"),
    "many values": (b'{"text": "a", "m": [' + b"[]," * 1_100_000 + b"1]}", "more than 1,000,000 values"),
    "too long": (b'{"text": "' + b"a" * 5_000_000 + b'"}', "longer than 4,000,000 bytes"),
}


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_told_with_its_number_and_the_others_are_read(tmp_path, kind, compression):
    line, message = BAD_LINES[kind]
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESSIONS[compression](b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}'))
    first, bad, second = rows_of(path, max_row_bytes=4_000_000)
    assert (first, second) == ("one", "two")
    assert isinstance(bad, BadRow)
    assert bad.where == f"{path} line 3"
    with pytest.raises(DataError, match=message):
        list(whole_texts([bad]))


@pytest.mark.parametrize(
    "kind", [kind for kind in BAD_LINES if kind not in ("two objects", "words", "cut", "zeros", "open lists")]
)
def test_a_bad_element_of_an_array_is_told_with_its_number(tmp_path, kind):
    element, message = BAD_LINES[kind]
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "one"},\n' + element + b',{"text": "two"}]\n')
    first, bad, second = rows_of(path, max_row_bytes=4_000_000)
    assert (first, second) == ("one", "two")
    assert bad.where == f"{path} row 2"
    with pytest.raises(DataError, match=message):
        list(whole_texts([bad]))


@pytest.mark.parametrize(
    "text", ["[", '[{"text": "a"}', '[{"text": "a"},', "[]x", "[] []", '[{"text": "a"}] 3', '["a', "[1] {}"]
)
def test_an_array_that_does_not_end_or_goes_on(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    last = rows_of(tmp_path / "a.json")[-1]
    assert isinstance(last, BadRow)
    assert last.damage


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("a.json", {"text": "one", "n": 1}, r"jq -c \. FILE > NEW\.jsonl \(or '\.NAME\[\]'"),
        ("a.jsonl", {"text": "one"}, r"jq -c \. FILE > NEW\.jsonl"),
        ("a.jsonl", [{"text": "one"}], r"jq -c '\.\[\]' FILE > NEW\.jsonl, or --format json"),
    ],
)
def test_json_over_several_lines_is_one_message(tmp_path, name, value, advice):
    path = tmp_path / name
    path.write_text("\n" + json.dumps(value, indent=2))
    with pytest.raises(DataError, match=rf"{name}: is JSON over several lines; as JSON lines each .*: {advice}"):
        rows_of(path)


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_an_array_over_several_lines_is_read(tmp_path, indent):
    (tmp_path / "a.json").write_text("\n " + json.dumps([{"text": text} for text in TEXTS], indent=indent))
    assert rows_of(tmp_path / "a.json") == TEXTS


@pytest.mark.parametrize("seed", range(30))
def test_arrays_are_cut_where_a_parser_cuts_them(seed):
    """Whatever is in the elements, and wherever the blocks end."""
    generator = random.Random(seed)

    def value(depth=0):
        kind = generator.randrange(6 if depth < 3 else 3)
        if kind < 3:
            return (
                "".join(generator.choices('ab\\"[]{},: \n\u4f60', k=generator.randrange(9)))
                if kind
                else generator.random()
            )
        return [value(depth + 1) for _ in range(3)] if kind == 3 else {str(n): value(depth + 1) for n in range(3)}

    values = [value() for _ in range(generator.randrange(20))]
    text = json.dumps(values, indent=generator.choice([None, 1]), ensure_ascii=False).encode()
    size = generator.randint(1, 40)
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    assert [json.loads(element or b"") for element in array_elements(blocks, 10_000)] == values


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_bad_rows_of_a_table(tmp_path, ending):
    separator = "," if ending == ".csv" else "\t"
    lines = ["id,text", "1,one", "2", "3,three,more", '4,"fo"ur', "5,five", '6,"six', 'and on"']
    path = tmp_path / f"a{ending}"
    path.write_bytes("\n".join(lines).replace(",", separator).encode() + b"\n7" + separator.encode() + b"\xff\n")
    rows = rows_of(path)
    assert [row for row in rows if isinstance(row, str)] == ["one", "five", "six\nand on"]
    bad = [str(row) for row in rows if isinstance(row, BadRow)]
    assert [row.split(":")[0] for row in bad] == [f"{path} line {n}" for n in (3, 4, 5, 9)]
    with pytest.raises(DataError, match="no column 'body' in its first line; allowed for --key: 'id', 'text'"):
        rows_of(path, key="body")
    path.write_bytes(b"")
    with pytest.raises(DataError, match="allowed for --key: none"):
        rows_of(path)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_quote_that_nothing_closes_takes_in_the_rest(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_text('text\none\n"two\n' + "three\n" * 5)
    [bad] = bad_of(path)
    assert bad.damage
    assert str(bad).startswith(f"{path} line 3: ")


def test_a_column_that_is_there_twice(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.csv").write_text("text,text,more\none,two,three\n")
    columns = [pyarrow.array([text]) for text in ("one", "two", "three")]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text", "more"]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(DataError, match=f"{name}: 2 columns 'text'"):
            rows_of(tmp_path / name)
    assert rows_of(tmp_path / "a.csv", key="more") == ["three"]


def test_nested_keys_in_every_format(tmp_path):
    rows = [{"a": {"b": {"c": text}}, "a.x": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(tmp_path / "a.jsonl", key="a.b.c") == rows_of(tmp_path / "a.jsonl", key="a.x") == TEXTS
    for key, message in (
        ("a.c", "no field 'a.c'; allowed for --key: 'a.b'"),
        ("a.x.y", "no field"),
        ("a.b", "is dict"),
    ):
        assert message in str(bad_of(tmp_path / "a.jsonl", key=key)[0])
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", key="a.b.c") == rows_of(tmp_path / "a.parquet", key="a.x") == TEXTS


PARQUET = ["string", "large_string", "binary", "large_binary", "dictionary", "string_view", "nullable"]


@pytest.mark.parametrize("kind", PARQUET)
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_columns_of_every_kind(tmp_path, kind, compression):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = [*TEXTS, None] if kind == "nullable" else TEXTS
    names = {"nullable": "string", "dictionary": "string"}
    column = pyarrow.array(values).cast(getattr(pyarrow, names.get(kind, kind))())
    column = column.dictionary_encode() if kind == "dictionary" else column
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=2, compression=compression)
    rows = rows_of(path)
    assert rows[: len(TEXTS)] == TEXTS
    assert [str(row) for row in rows[len(TEXTS) :]] == (
        [f"{path} row {len(TEXTS)}: field 'text' is null, text is needed"] if kind == "nullable" else []
    )


def test_a_binary_column_that_is_no_text_and_a_column_of_numbers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = {"text": pyarrow.array([b"ok", b"\xff"]), "n": [1, 2], "l": [["a"], ["b"]]}
    parquet.write_table(pyarrow.table(content), tmp_path / "a.parquet")
    assert "row 1: not readable as UTF-8 text; byte 0xff" in str(bad_of(tmp_path / "a.parquet")[0])
    assert len(bad_of(tmp_path / "a.parquet", key="n")) == len(bad_of(tmp_path / "a.parquet", key="l")) == 2


@pytest.mark.parametrize("seed", range(20))
def test_damaged_parquet_is_told(tmp_path, seed):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    generator = random.Random(seed)
    texts = [f"{generator.getrandbits(512):x}" for _ in range(300)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50, write_page_checksum=True)
    whole = bytearray(path.read_bytes())
    place = generator.randrange(4, len(whole) - 4)
    whole[place : place + 4] = bytes(4) if seed % 2 else b""
    path.write_bytes(whole)
    found, said = [], ""
    try:
        found = rows_of(path)
    except DataError as error:
        said = str(error)
    bad = [str(row) for row in found if isinstance(row, BadRow)]
    assert found == texts or "a.parquet" in " ".join([said, *bad])


def test_a_long_text_file_is_read_in_pieces(tmp_path):
    text = "".join(f"line {n} \u4f60\n" for n in range(200_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    [row] = rows_of(tmp_path / "a.txt")
    assert isinstance(row, LongText)
    assert "".join(map(str, row.pieces)) == text
    (tmp_path / "a.txt").write_bytes(text.encode() + b"x\xff\n")
    [row] = rows_of(tmp_path / "a.txt")
    assert str(list(row.pieces)[-1]) == (
        f"{tmp_path}/a.txt line 200001: not readable as UTF-8 text; byte 0xff at byte 1 of it; or give --encoding"
    )


def test_paragraphs_with_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\xff\nmore\n\nthree\r\rfour\n\n" + b"x" * 200 + b"\n\nfive")
    rows = rows_of(tmp_path / "a.txt", text_documents="paragraph", max_row_bytes=100)
    assert [row for row in rows if isinstance(row, str)] == ["one\n", "three\r", "four\n", "five"]
    assert [row.where.rpartition(" ")[2] for row in rows if isinstance(row, BadRow)] == ["4", "11"]


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"\x04\x22\x4d\x18"])
def test_archives_are_told_by_name(tmp_path, start):
    (tmp_path / "a.jsonl").write_bytes(start + bytes(20))
    with pytest.raises(DataError, match="unpack it first"):
        rows_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_name_that_promises_a_compression(tmp_path, ending):
    (tmp_path / f"a.jsonl{ending}").write_bytes(b'{"text": "x"}')
    with pytest.raises(DataError, match=rf"holds no \{ending} data"):
        rows_of(tmp_path / f"a.jsonl{ending}")


def test_a_folder_lists_what_it_takes_and_what_it_leaves_out(tmp_path):
    taken = ["a.jsonl", "b.JSONL.GZ", "sub/c.Txt", "sub/d.csv.zst", "e.md"]
    left = [
        "README.md", "readme.txt", "LICENSE", "LICENSE.txt", "dataset_infos.json", ".gitattributes", ".hidden/x.jsonl",
        "tokens.bin", "tokens.idx", "tokens.json", "x.pdf", "y.tar.gz", "sub/._c.txt", "tokenizer.json",
    ]  # fmt: skip
    for name in [*taken, *left]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    found = find_inputs([tmp_path])
    assert sorted(str(path.relative_to(tmp_path)) for path in found.files) == sorted(taken)
    report = found.report()
    assert "takes 5 files: 1 .csv.zst, 1 .jsonl, 1 .jsonl.gz, 1 .md, 1 .txt" in report
    for words in (
        "3 hidden",
        "2 not regular files",
        "1 links to folders (loop)",
        "1 of prepared data",
        "cards and settings",
    ):
        assert words in report
    assert find_inputs([tmp_path / "README.md"]).files == [tmp_path / "README.md"]  # named, it is read
    assert find_inputs([tmp_path / "README.md"]).report() == ""


@pytest.mark.parametrize("name", ["-", "none", "a\0b", "x" * 300])
def test_inputs_that_are_not_there(name):
    with pytest.raises(DataError, match="input "):
        find_inputs([Path(name)])


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", "/dev/zero"):
        with pytest.raises(DataError, match="is no regular file"):
            find_inputs([Path(path)])


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(DataError, match=r"no file ending in .*; left out: a\.docx"):
        find_inputs([tmp_path])


def test_bad_rows_are_told_together(tmp_path):
    bad = BadRows()
    for number in range(3):
        bad.add(BadRow(f"a.jsonl line {number}", "not JSON" if number else "no field 'text'"))
    with pytest.raises(DataError, match=r"3 bad rows \(1 no field 'text', 2 not JSON\)") as told:
        bad.check(tmp_path)
    assert all(f"a.jsonl line {number}" in str(told.value) for number in range(3))
    assert not bad.full
    for number in range(STOP_AFTER):
        bad.add(BadRow(f"b.jsonl line {number}", "not JSON"))
    assert bad.full


def test_limit_counts_documents():
    rows: list[Row] = ["a", BadRow("x", "y"), "b", "c"]
    assert list(limited(iter(rows), 2)) == ["a", rows[1], "b"]
