"""Files cut into ranges: whatever the size of a cut, the records are those of the whole file, and a mistake is named where it stands."""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.config.schema import Source
from harness.data import prepare as module
from harness.data import encode, ranges, sources
from harness.data.examples import reader
from harness.data.prepare import prepare
from harness.data.ranges import InputRange
from harness.data.records import Broken, Record, read
from harness.errors import Refused
from harness.formats.index import read_index
from tests.data.conftest import make_run, write_pairs

WHOLE = 1 << 40
COLUMNS = ("prompt", "completion")
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SIZES = st.integers(1, 200)


def records(path: Path, kind: str, size: int, *, encoding: str = "utf-8", columns: tuple[str, ...] = COLUMNS) -> list[Record]:
    """All records of a file that is cut into ranges of `size` bytes, in order."""
    whole = ranges.whole_file(path, path, kind, key="data.train", encoding=encoding, columns=columns)
    parts = ranges.cut(whole, size)
    _adjacent(parts)
    return [record for part in parts for record in read(part)]


def _adjacent(parts: list[InputRange]) -> None:
    """Each range begins where the one before it ends."""
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder for files that are written over and over."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# For any cut size


@QUICK
@given(st.lists(st.one_of(st.builds(lambda t: json.dumps({"prompt": t, "completion": t[::-1]}, ensure_ascii=False), ANY_TEXT),
                          st.sampled_from(["", "  ", "{oops", "[1]", '{"prompt": NaN}', '{"prompt": "\\ud800"}'])), max_size=20),
       st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), SIZES)
def test_jsonl(place, lines, newline, ended, marked, size):
    path = place / "a.jsonl"
    text = newline.join(line for line in lines) + (newline if ended else "")
    path.write_bytes((codecs.BOM_UTF8 if marked else b"") + text.encode() + b"x\n")
    assert repr(records(path, "jsonl", size)) == repr(records(path, "jsonl", WHOLE))


FIELD = st.text(st.one_of(st.sampled_from('\n\r", ;'), st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=12)


@QUICK
@given(st.lists(st.lists(FIELD, min_size=1, max_size=2), max_size=20), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["utf-8", "gb18030"]), SIZES)
def test_csv_is_what_the_library_reads_from_the_whole_text(place, rows, newline, encoding, size):
    path, text = place / "a.csv", io.StringIO()
    quoting = csv.QUOTE_MINIMAL if newline == "\r\n" else csv.QUOTE_ALL  # the writer leaves other ends of lines than its own bare
    csv.writer(text, lineterminator=newline, quoting=quoting).writerows([COLUMNS, *rows])
    path.write_bytes(text.getvalue().encode(encoding))
    expected = [dict(zip(COLUMNS, row, strict=False)) if row else None for row in csv.reader(io.StringIO(text.getvalue(), newline=""))][1:]
    assert records(path, "csv", size, encoding=encoding) == expected


@QUICK
@given(st.text(st.sampled_from('\n\r",ab'), max_size=60), st.integers(1, 30))
def test_csv_with_mistakes(place, text, size):
    path = place / "a.csv"
    path.write_bytes(b"prompt,completion\n" + text.encode())
    cut, whole = ([record.reason if isinstance(record, Broken) else record for record in records(path, "csv", where)] for where in (size, WHOLE))
    assert cut == whole


BLANK = st.sampled_from(["\n\n", "\n \t\n", "\r\n\r\n", "\n\n\n\n", "\n", "\r\n", "\n\n\r", "\n\n\u2003\n", "\r\r", " ", "\f\n\n"])


@QUICK
@given(st.lists(st.tuples(ANY_TEXT, BLANK), min_size=1, max_size=20), SIZES)
@example([("a", "\n\n\n\n"), ("b", "\n")], 2)
def test_text_joined_is_that_of_the_whole_file(place, pieces, size):
    path = place / "a.txt"
    path.write_bytes("".join(text + blank for text, blank in pieces).encode() + b"end")
    for where in (size, WHOLE):
        found = [record["text"] for record in records(path, "text", where, columns=("text",))]
        assert "".join(found) == path.read_text(encoding="utf-8")


@QUICK
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 4000))
def test_parquet(place, groups, size):
    path, rows = place / "a.parquet", [{"prompt": f"q{n}", "completion": None if n % 7 == 0 else "a" * (n % 50)} for n in range(sum(groups))]
    table, first = pa.Table.from_pylist([*rows, {"prompt": "last", "completion": "x"}]), 0
    with pq.ParquetWriter(path, table.schema) as writer:
        for count in [*groups, 1]:
            writer.write_table(table.slice(first, count))
            first += count
    assert records(path, "parquet", size) == table.to_pylist()


@QUICK
@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 150))
def test_grouping_keeps_the_order_and_the_size(sizes, size):
    parts = [InputRange("text", str(n), "", "", "utf-8", (), 0, held, held) for n, held in enumerate(sizes)]
    groups = ranges.group(parts, size)
    assert [part for group in groups for part in group] == parts
    assert all(len(group) == 1 or sum(part.size for part in group) <= size for group in groups)
    assert all(sum(p.size for p in (*a, b[0])) > size for a, b in zip(groups, groups[1:], strict=False))


# A large file of each kind


def _gb18030(path: Path, rows: int) -> list[list[str]]:
    """A CSV file of some MB with quotes, commas and newlines in its fields; its rows."""
    draw = random.Random(3)
    words = ["你好", "世界", "第一行\n第二行", "他说\"好\"", "逗号,逗号", "𠀀", "naïve", "\r\n", "🙂", "尺寸 5\" 管"]
    lines = [[f"问题{n}：" + "".join(draw.choices(words, k=5)), "".join(draw.choices(words, k=draw.randint(1, 60)))] for n in range(rows)]
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *lines])
    path.write_bytes(text.getvalue().encode("gb18030"))
    return lines


def test_a_large_csv_file_in_gb18030(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 1 << 18)
    path = tmp_path / "pairs.csv"
    lines = _gb18030(path, 12_000)
    assert path.stat().st_size > 2 << 20
    with open(path, encoding="gb18030", newline="") as stream:
        expected = list(csv.reader(stream))[1:]
    assert expected == lines
    assert [[record["prompt"], record["completion"]] for record in records(path, "csv", 1 << 18, encoding="gb18030")] == expected
    held = write_pairs(tmp_path / "held.jsonl", 5)
    run = make_run(tmp_path, train={"path": str(path), "encoding": "gb18030"}, validation={"path": str(held)}, shape="prompt_completion", num_processes=1)
    facts = prepare(run, progress=False).facts()["train"]
    index = read_index(tmp_path / "data" / "train")
    assert len(index.shards) > 8 and facts["documents"] == sum(bool(q.strip() and a.strip()) for q, a in expected)
    assert _texts(tmp_path / "data") == [f"{q}\n{a}<|endoftext|>" for q, a in expected if a.strip()]
    assert [source.first_row for shard in index.shards for source in shard.sources][:2] == [0, index.shards[0].sources[0].rows]


def _texts(folder: Path, name: str = "train") -> list[str]:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return [tokenizer.decode(row["input_ids"]) for row in datasets.load_from_disk(str(folder / name))]


def test_a_stray_quote_in_an_unquoted_field_is_a_character(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + '5" pipe,it\'s 2" wide\n' * 50 + '"quoted, so",x\n')
    for size in (1, 100, WHOLE):
        assert records(path, "csv", size) == [{"prompt": '5" pipe', "completion": "it's 2\" wide"}] * 50 + [{"prompt": "quoted, so", "completion": "x"}]


BROKEN_CSV = "prompt,completion\n" + "q,a\n" * 30 + '"closed"too early,a\n' + "q,a\n" * 30 + "one,two,three\n" + "q,a\n" * 30


@pytest.mark.parametrize("size", [10, WHOLE])
def test_broken_rows_of_a_csv_file_are_found_whatever_the_cut(tmp_path, size):
    path = tmp_path / "a.csv"
    path.write_text(BROKEN_CSV)
    found = records(path, "csv", size)
    assert [(record.line, number) for number, record in enumerate(found) if isinstance(record, Broken)] == [(32, 30), (63, 61)]
    assert len(found) == 92


@pytest.mark.parametrize("size", [10, WHOLE])
def test_an_open_quote_is_named_where_it_opens_and_takes_no_other_row_with_it(tmp_path, size):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + "q,a\n" * 30 + '"never closed,a\n' + "q,a\n" * 30 + '"closed","so\nit is"\n' + 'q,"never\n' + "q,a\n")
    found, row = records(path, "csv", size), {"prompt": "q", "completion": "a"}
    assert [record.line for record in found if isinstance(record, Broken)] == [32, 65]
    assert [record for record in found if isinstance(record, dict)] == [row] * 60 + [{"prompt": "closed", "completion": "so\nit is"}, row]


@pytest.mark.parametrize("size", [10, WHOLE])
def test_a_carriage_return_alone_ends_a_row_of_a_csv_file(tmp_path, size):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n" + b'a,b\rc,"d\re\nf"\r\ng,h\n' * 30)
    assert records(path, "csv", size) == [dict(zip(COLUMNS, row, strict=True)) for row in (("a", "b"), ("c", "d\re\nf"), ("g", "h"))] * 30


def test_one_large_row_group_and_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 1 << 14)
    path, rows = tmp_path / "a.parquet", [{"prompt": f"q {n}", "completion": f"answer {n} " * 5} for n in range(4000)]
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(path, table.schema) as writer:
        for first, last in ((0, 10), (10, 3500), (3500, 3501), (3501, 3800), (3800, 4000)):
            writer.write_table(table.slice(first, last - first), row_group_size=4000)
    held = write_pairs(tmp_path / "held.jsonl", 5)
    run = make_run(tmp_path, train={"path": str(path)}, validation={"path": str(held)}, shape="prompt_completion", num_processes=1)
    prepare(run, progress=False)
    index = read_index(tmp_path / "data" / "train")
    assert len(index.shards) > 4 and sum(source.rows for shard in index.shards for source in shard.sources) == 4000
    assert _texts(tmp_path / "data") == [f"{row['prompt']}\n{row['completion']}<|endoftext|>" for row in rows]


def test_a_text_file_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 1 << 14)
    paragraphs = [f"Paragraph {n} " + "word " * (n % 300) + "\nsecond line" for n in range(400)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "held.txt").write_text("something else")
    run = make_run(tmp_path, train={"path": str(tmp_path / "a.txt")}, validation={"path": str(tmp_path / "held.txt")}, shape="text", num_processes=1)
    prepare(run, progress=False)
    assert len(read_index(tmp_path / "data" / "train").shards) > 10
    assert "".join(_texts(tmp_path / "data")) == "\n\n".join(paragraphs) + "<|endoftext|>"


@pytest.mark.parametrize("size", [1 << 12, 1 << 20])
def test_a_text_file_without_blank_lines_is_cut_at_lines(tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", size)
    monkeypatch.setattr(ranges, "LOOKED_FOR_BYTES", 1 << 10)
    lines = "".join(f"Line {n} says {n * 7}.\n" for n in range(3000))
    (tmp_path / "a.txt").write_text(lines)
    run = make_run(tmp_path, train={"path": str(tmp_path / "a.txt")}, shape="text", num_processes=1)
    facts = prepare(run, progress=False).facts()
    assert facts["train"]["shards"] == (1 if size > 1 << 14 else 16)
    both = [text for name in ("train", "validation") for text in _texts(tmp_path / "data", name)]
    assert sum(text.endswith("<|endoftext|>") for text in both) == 1 and sorted("".join(both).replace("<|endoftext|>", "").splitlines()) == sorted(lines.splitlines())


def test_the_pieces_of_a_text_file_are_one_document_and_its_end_is_the_file_s(tmp_path, monkeypatch):
    books = {name: "\n\n\n".join(f"  Chapter {n} of {name} " + "word " * 300 for n in range(40)) + "\n" for name in ("a", "b")}
    for name, text in books.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "held.txt").write_text("something else")
    run = make_run(tmp_path, train={"path": str(tmp_path / "[ab].txt")}, validation={"path": str(tmp_path / "held.txt")}, shape="text", sequence_length=512)
    facts = prepare(run, progress=False).facts()["train"]
    assert _texts(tmp_path / "data") == [f"{text}<|endoftext|>" for text in books.values()]
    assert facts["rows in"] > 20 and facts["documents"] == 2 and facts["trained tokens"] == facts["tokens"] - 2 and float(facts["filled"][:-1]) > 95
    digests = [shard.digest for shard in read_index(tmp_path / "data" / "train").shards]
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(module, "TEXT_VERSION", 0)
    prepare(run, progress=False)
    assert [shard.digest for shard in read_index(tmp_path / "data" / "train").shards] == digests
    monkeypatch.setattr(encode, "LONGEST_DOCUMENT", 9000)
    monkeypatch.setattr(module, "TEXT_VERSION", 1)
    prepare(run, progress=False)
    documents = _texts(tmp_path / "data")
    assert len(documents) > 10 and "".join(documents) == "".join(f"{text}<|endoftext|>" for text in books.values())


def test_rows_of_a_text_file_that_are_cut_off_leave_it_open(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{n} " + "word " * 500 for n in range(9)))
    (tmp_path / "held.txt").write_text("something else")
    for rows, is_open in ((3, True), (100, False)):
        run = make_run(tmp_path / str(rows), train={"path": str(tmp_path / "a.txt"), "max_rows": rows}, validation={"path": str(tmp_path / "held.txt")}, shape="text")
        prepare(run, progress=False)
        [text] = _texts(tmp_path / str(rows) / "data")
        assert text.endswith("<|endoftext|>") != is_open


def test_many_small_files_make_one_shard(tmp_path):
    for number in range(30):
        write_pairs(tmp_path / f"part-{number:02d}.jsonl", 3, seed=number)
    held = write_pairs(tmp_path / "held.jsonl", 5, seed=99)
    run = make_run(tmp_path, train={"path": str(tmp_path / "part-*.jsonl")}, validation={"path": str(held)}, shape="prompt_completion")
    prepare(run, progress=False)
    [shard] = read_index(tmp_path / "data" / "train").shards
    assert [(Path(source.file).name, source.first_row, source.rows) for source in shard.sources] == [(f"part-{n:02d}.jsonl", 0, 3) for n in range(30)]
    assert shard.origin(4) == (str(tmp_path / "part-01.jsonl"), 1)


def test_each_file_is_read_by_its_own_suffix(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "of a line"}) + "\n")
    (tmp_path / "c.csv").write_text("text\nof a row\n")
    found = _opened(tmp_path, Source(path=str(tmp_path / "[abc].*")), 1000, "text")
    assert [record["text"] for record in found] == ["some text", "of a line", "of a row"]
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "of a line"}) + "\n")
    with pytest.raises(Refused, match="b.jsonl has no column 'text'; it has body"):
        _opened(tmp_path, Source(path=str(tmp_path / "[abc].*")), 1000, "text")
    (tmp_path / "c").write_text("text")
    with pytest.raises(Refused, match="format of .*/c is not known"):
        _opened(tmp_path, Source(path=str(tmp_path / "[ac]*")), 1000, "text")


def test_two_stars_go_through_all_folders_below(tmp_path):
    folder = tmp_path / "deep" / "er" / "est"
    folder.mkdir(parents=True)
    for number, place in enumerate((folder, *folder.parents[:2])):
        write_pairs(place / f"{number}.jsonl", 1, seed=number)
    assert len(_opened(tmp_path, Source(path=str(tmp_path / "deep" / "**" / "*.jsonl")), 1000)) == 3


# Encodings


def _opened(tmp_path: Path, source: Source, size: int, shape: str = "prompt_completion") -> list[Record]:
    """The records of a source as preparation reads them."""
    data = make_run(tmp_path, train=source.model_dump(), shape=shape).data
    groups = sources.open_source(source, data, key="data.train", cache=tmp_path / "cache", size=size)
    return [record for group in groups for part in group for record in read(part) if record is not None]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-8", "gb18030", "big5", "shift_jis", "cp1252", "cp037", "iso2022_jp"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_encodings(tmp_path, encoding, suffix):
    sample = {"big5": "你好\\功", "shift_jis": "ソ表能\\", "iso2022_jp": "日本語", "cp1252": "naïve “so”", "cp037": "naïve so"}.get(encoding, "你好 naïve ਊ਀ 🙂")
    texts = [f"{n} {sample} " * (n % 5 + 1) for n in range(400)]
    text = io.StringIO()
    if suffix == "csv":
        csv.writer(text).writerows([COLUMNS, *([t, f"a\n\n{t}"] for t in texts)])
    elif suffix == "jsonl":
        text.write("".join(json.dumps({"prompt": t, "completion": f"a\n\n{t}"}, ensure_ascii=False) + "\n" for t in texts))
    else:
        text.write("\n\n".join(texts))
    (tmp_path / f"a.{suffix}").write_bytes(text.getvalue().encode(encoding))
    found = _opened(tmp_path, Source(path=str(tmp_path / f"a.{suffix}"), encoding=encoding), 1000, "text" if suffix == "txt" else "prompt_completion")
    if suffix == "txt":
        assert "".join(record["text"] for record in found) == "\n\n".join(texts)
    else:
        assert found == [{"prompt": t, "completion": f"a\n\n{t}"} for t in texts]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    content = {"jsonl": '{"prompt": "q", "completion": "a"}\n' * 9, "csv": "prompt,completion\n" + "q,a\n" * 9, "txt": "q\n\na\n\n" * 9}[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(codecs.BOM_UTF8 + content.encode())
    found = _opened(tmp_path, Source(path=str(tmp_path / f"a.{suffix}")), 20, "text" if suffix == "txt" else "prompt_completion")
    assert {key: value[0] for key, value in found[0].items()} == ({"text": "q"} if suffix == "txt" else {"prompt": "q", "completion": "a"})


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_wrong_byte_in_the_middle_of_a_large_file_is_named(tmp_path, suffix, encoding):
    text = {"jsonl": json.dumps({"prompt": "q" * 90, "completion": "a"}) + "\n", "csv": "q" * 90 + ",a\n", "txt": "q" * 90 + "\n\n"}[suffix] * 20_000
    content = bytearray((("prompt,completion\n" if suffix == "csv" else "") + text).encode(encoding))
    place = content.index("qq".encode("utf-16-le" if encoding == "utf-16" else "utf-8"), len(content) // 2)
    content[place : place + 2] = b"\xe9q" if encoding == "utf-8" else b"\x00\xdc"
    (tmp_path / f"a.{suffix}").write_bytes(content)
    run = make_run(tmp_path, train={"path": str(tmp_path / f"a.{suffix}"), "encoding": encoding}, shape="text" if suffix == "txt" else "prompt_completion")
    with pytest.raises(Refused, match=rf"a\.{suffix} is not {encoding}: byte {place} cannot be decoded"):
        prepare(run, progress=False)


def test_half_a_character_at_the_end_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("whole text".encode("utf-16") + b"x")
    with pytest.raises(Refused, match="byte 22 cannot be decoded"):
        _opened(tmp_path, Source(path=str(tmp_path / "a.txt"), encoding="utf-16"), 1000, "text")


# Some rows only, and rows that cannot be read


def _file(folder: Path, kind: str, count: int) -> Path:
    path, rows = folder / f"a.{kind}", [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(count)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n\n' for r in rows))
    elif kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        path.write_text("\n\n".join(f"{n} " + "x" * 3000 for n in range(count)))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
@pytest.mark.parametrize("wanted", [1, 13, 40, 41])
@pytest.mark.parametrize("size", [50, WHOLE])
def test_the_first_rows_only(tmp_path, kind, wanted, size):
    shape = "text" if kind == "txt" else "prompt_completion"
    path = _file(tmp_path, kind, 40)
    every = _opened(tmp_path, Source(path=str(path)), size, shape)
    assert len(every) == 40
    assert _opened(tmp_path, Source(path=str(path), max_rows=wanted), size, shape) == every[:wanted]


def test_the_first_rows_of_builtin_questions(tmp_path):
    found = _opened(tmp_path, Source(builtin="python-qa", max_rows=17), 1000)
    assert found == _opened(tmp_path, Source(builtin="python-qa"), 1000)[:17] and len(found) == 17


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_broken_rows_are_counted_named_and_limited(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 500)
    path = _file(tmp_path, kind, 100)
    lines = path.read_text().split("\n")
    for number in (24, 150):
        lines[number] = "{oops" if kind == "jsonl" else "one,two,three"
    path.write_text("\n".join(lines))
    options = {"train": {"path": str(path)}, "shape": "prompt_completion", "num_processes": 1}
    with pytest.raises(Refused, match=rf"a\.{kind} line (25|151) "):  # two shards at a time
        prepare(make_run(tmp_path, **options), progress=False)
    with pytest.raises(Refused, match=rf"2 of \d+ rows of the train set would be dropped: 2 because cannot be read. The first .*a\.{kind}:25 "):
        prepare(make_run(tmp_path, **options, broken_rows="drop", max_dropped_share=0.02), progress=False)
    prepare(make_run(tmp_path, **options, broken_rows="drop"), progress=False)
    audit = read_index(tmp_path / "data" / "train").audit
    assert audit["dropped"] == {"cannot be read": 2}
    assert [place.split(" ")[0] for place in audit["broken"]] == [f"{path}:25", f"{path}:151"]


def _values(path: Path, kind: str, values: list[object]) -> Path:
    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(40)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{"prompt": "q", "completion": value} for value in values]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *({"prompt": "q", "completion": value} for value in values)]))
    return path


@pytest.mark.parametrize("value, told", [
    (["a", "b"], "row 1 holds a list instead of text in column 'completion'"), ({"text": ["a"]}, "row 1 holds a dict instead of text"),
    (b"caf\xe9", "row 1 holds bytes that are not UTF-8 in column 'completion'"), (datetime.date(2024, 1, 2), "row 1 holds a date instead of text"),
])
def test_values_that_are_no_text_are_refused_by_row_and_column(tmp_path, value, told):
    path = _values(tmp_path / "a.parquet", "parquet", [value] * 9)
    with pytest.raises(Refused, match=told):
        prepare(make_run(tmp_path, train={"path": str(path)}, shape="prompt_completion"), progress=False)


def test_a_list_among_text_is_named_by_line_or_counted(tmp_path):
    options = {"train": {"path": str(_values(tmp_path / "a.jsonl", "jsonl", [["b"]]))}, "shape": "prompt_completion"}
    with pytest.raises(Refused, match="a.jsonl line 41 holds a list instead of text in column 'completion'"):
        prepare(make_run(tmp_path, **options), progress=False)
    prepare(make_run(tmp_path, **options, broken_rows="drop"), progress=False)
    audit = read_index(tmp_path / "data" / "train").audit
    assert audit["dropped"] == {"cannot be read": 1} and audit["broken"] == [f"{tmp_path}/a.jsonl:41 holds a list instead of text in column 'completion'"]


def test_numbers_are_text_and_what_is_not_a_number_is_missing(tmp_path):
    read_row = reader(make_run(tmp_path, train={"path": "unused"}, shape="prompt_completion").data)
    for value, text in ((7, "7"), (0.5, "0.5"), (True, "True"), ("café".encode(), "café"), (float("nan"), None), (None, None), (b"", None)):
        assert read_row({"prompt": "q", "completion": value}) == (text and ("q", text))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_that_stands_twice_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("prompt,completion,completion\n" + "q,a,b\n" * 9)
    else:
        pq.write_table(pa.Table.from_arrays([pa.array(["q"]), pa.array(["a"]), pa.array(["b"])], names=["prompt", "completion", "completion"]), path)
    with pytest.raises(Refused, match="2 columns named 'completion'"):
        prepare(make_run(tmp_path, train={"path": str(path)}, shape="prompt_completion"), progress=False)


# Halves of surrogate pairs

HALF = {"prompt": "q", "completion": "cut emoji \ud83d"}


@pytest.mark.parametrize("train_tokenizer", [False, True])
def test_half_a_surrogate_pair_is_named_or_counted(tmp_path, prepared, train_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": f"\U0001f600 {n}", "note": "\ud83d"}) + "\n" for n in range(120)) + json.dumps(HALF) + "\n")
    options = {"train": {"path": str(path)}, "shape": "prompt_completion"} | ({} if train_tokenizer else {"train_tokenizer": None, "tokenizer": str(prepared / "tokenizer")})
    with pytest.raises(Refused, match="a.jsonl line 121 holds half a surrogate pair"):
        prepare(make_run(tmp_path, **options), progress=False)
    prepare(make_run(tmp_path, **options, broken_rows="drop"), progress=False)
    indexes = [read_index(tmp_path / "data" / name) for name in module.SETS]
    assert sum(index.audit["rows_in"] for index in indexes) == 121 and indexes[0].audit["dropped"] == {"cannot be read": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_half_a_surrogate_pair_in_json_in_a_column_is_named(tmp_path, suffix):
    talks = [json.dumps([{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": text}], indent=1) for text in ("\U0001f600", "b", "c\ude00")]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"messages": talks}), path)
    elif suffix == "csv":
        with open(path, "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([["messages"], *([talk] for talk in talks)])
    else:
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    place = {"jsonl": "line 3", "csv": "line 22", "parquet": "row 3"}[suffix]
    with pytest.raises(Refused, match=f"a.{suffix} {place} holds half a surrogate pair"):
        prepare(make_run(tmp_path, train={"path": str(path)}, shape="messages"), progress=False)
