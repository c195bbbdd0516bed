"""Files of every format that are read, and those that cannot be."""

import csv
import hashlib
import io
import json
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, strategies as st

from benchmarks import fuzz
from l2a.config import Columns
from l2a.data.domains import hashed_split, load_domain, text_key
from l2a.data.readers import NO_LABELS, USUAL_COLUMNS, Table, check_table, read_records
from l2a.util.errors import UsageError
from tests.conftest import save_frame

from .bad_files import BAD_FILES

RECORDS = [
    {"text": "a, fine film", "label": "positive", "split": "train"},
    {"text": 'a "bad" one\nin two lines', "label": "negative", "split": "train"},
    {"text": "über gut", "label": "positive", "split": "dev"},
    {"text": "so-so", "label": "negative", "split": "test"},
]
COLUMNS = ("text", "label")
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1).filter(str.strip)


FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".feather", ".csv.gz", ".tsv.bz2", ".jsonl.xz", ".json.gz")


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_domain(tmp_path, suffix):
    path = save_frame(pd.DataFrame(RECORDS), tmp_path / f"films{suffix}")
    domain = load_domain(str(path))
    assert domain.name == "films" and domain.label_names == ("negative", "positive")
    assert domain.train.inputs == (("a, fine film",), ('a "bad" one\nin two lines',))
    assert domain.train.labels.tolist() == [1, 0] and domain.test.size == 1
    assert domain.dev.inputs == (("über gut",),) and domain.test.reveal().inputs == (("so-so",),)
    assert domain.files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_file_without_splits_is_cut_by_hash_about_70_10_20(write):
    lines = "".join(f"sentence {i},{'xy'[i % 2]}\n" for i in range(2000))
    domain = load_domain(str(write("all.csv", "text,label\n" + lines)))
    assert [len(domain.train), len(domain.dev), domain.test.size] == pytest.approx([1400, 200, 400], abs=45)
    assert all(hashed_split(text_key(text)) == "train" for text in domain.train.inputs)


def test_copies_that_differ_in_case_fall_into_one_split(write):
    lines = "".join(f"Sentence {i},{'xy'[i % 2]}\nsentence  {i},{'xy'[i % 2]}\n" for i in range(200))
    domain = load_domain(str(write("all.csv", "text,label\n" + lines)))
    folded = [{text.lower().replace("  ", " ") for (text,) in part.inputs} for part in (domain.train, domain.dev)]
    assert not folded[0] & folded[1]
    assert all(len(part.inputs) % 2 == 0 for part in (domain.train, domain.dev, domain.test.reveal()))


def test_data_without_dev_gives_an_eighth_of_train_away_and_leaves_test_alone(write):
    lines = "".join(f"s {i},{'xy'[i % 2]},{'test' if i % 5 == 0 else 'train'}\n" for i in range(1000))
    domain = load_domain(str(write("all.csv", "text,label,split\n" + lines)))
    assert abs(len(domain.dev) - 100) < 35 and domain.test.size == 200


def test_pairs_are_found_and_pairs_with_one_premise_stay_together(write):
    rows = [{"premise": f"p{i // 4}", "hypothesis": f"h{i}", "label": "ab"[i % 2]} for i in range(400)]
    domain = load_domain(str(write("nli.json", json.dumps(rows))))
    assert domain.is_pair
    premises = [{text[0] for text in part.inputs} for part in (domain.train, domain.dev, domain.test.reveal())]
    assert not premises[0] & premises[1] and not premises[0] & premises[2] and not premises[1] & premises[2]


def test_named_columns_are_used_and_a_second_text_that_is_always_empty_is_none(write):
    path = write("x.csv", "text,text_pair,body,second,stars,split\nno,,a,b,1,train\nno,,c,d,2,train\n")
    single = load_domain(str(path), Columns(text="body", label="stars"))
    pair = load_domain(str(path), Columns(text="body", text_pair="second", label="stars"))
    assert single.train.inputs == (("a",), ("c",)) and single.label_names == ("1", "2")
    assert pair.train.inputs == (("a", "b"), ("c", "d")) and pair.is_pair
    assert not load_domain(str(path), Columns(label="stars")).is_pair


def test_integer_and_float_labels_are_names(tmp_path):
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [1.0, 0.0, 1.0], "split": "train"})
    assert load_domain(str(save_frame(frame, tmp_path / "x.parquet"))).label_names == ("0", "1")


def test_a_folder_of_splits_is_read_and_one_with_only_train_is_split_like_one_file(write):
    write("films/train.csv", "text,label\na,x\nb,y\n")
    write("films/validation.jsonl", '{"text": "c", "label": "x"}\n')
    write("films/test.tsv", "text\tlabel\nd\ty\n")
    domain = load_domain("films")
    assert (domain.name, len(domain.train), len(domain.dev), domain.test.size) == ("films", 2, 1, 1)
    assert sorted(domain.files) == ["test.tsv", "train.csv", "validation.jsonl"]
    write("alone/train.csv", "text,label,split\na,x,train\nb,y,train\nc,x,test\n")
    assert load_domain("alone").test.reveal().inputs == (("c",),)


def test_relative_paths_start_at_the_data_root(write, tmp_path):
    write("../data/x.csv", "text,label,split\na,x,train\nb,y,train\n")
    assert load_domain("x.csv", data_root=tmp_path / "data").name == "x"


def test_long_fields_are_read_and_leave_the_csv_module_as_it_was(write):
    csv.field_size_limit(131_072)
    path = write("x.csv", f"text,label,split\n{'w' * 200_000},x,train\nb,y,train\n")
    assert len(load_domain(str(path)).train.inputs[0][0]) == 200_000
    assert csv.field_size_limit() == 131_072


LABEL = TEXT.filter(lambda name: name.strip().lower() not in NO_LABELS)
ROWS = st.lists(st.tuples(TEXT, LABEL), min_size=1, max_size=8)


def as_file(rows, suffix, end):
    """Text and labels as a well-written file of any kind."""
    if suffix in (".json", ".jsonl"):
        objects = [json.dumps({"text": text, "label": label}, ensure_ascii=end == "\r") for text, label in rows]
        return f"[{','.join(objects)}]" if suffix == ".json" else end.join(objects)
    buffer = io.StringIO(newline="")
    separator = "," if suffix == ".csv" else "\t"
    csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([COLUMNS, *rows])
    return buffer.getvalue()


def records_of(content, suffix, folder):
    path = folder.mktemp("read") / f"x{suffix}"
    path.write_bytes(content)
    return Table("x", list(read_records(path, suffix)))


@given(ROWS, st.sampled_from([".csv", ".tsv", ".json", ".jsonl"]), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_any_text_survives_any_format(tmp_path_factory, rows, suffix, end, mark):
    content = as_file(rows, suffix, end).encode("utf-8-sig" if mark else "utf-8")
    found, problems = check_table(records_of(content, suffix, tmp_path_factory), USUAL_COLUMNS)
    assert not problems
    assert [(row.text[0], row.label) for row in found] == [(text, label.strip()) for text, label in rows]


PIECES = (b"text", b"label", b"1", b",", b"\t", b'"', b"\n", b"\r", b"\0", b"{", b"}", b"[", b"]", b":", b"\\ud800")
ODD = (b"\xef\xbb\xbf", b"\xed\xa0\x80", b"a" * 200_000)  # a byte order mark, half a pair, a field above csv's limit
BYTES = st.binary(max_size=200) | st.lists(st.sampled_from(PIECES + ODD), max_size=20).map(b"".join)


@given(BYTES, st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet", ".arrow"]), st.booleans())
def test_no_bytes_crash_a_reader(tmp_path_factory, data, suffix, labelled):
    try:
        table = records_of(data, suffix, tmp_path_factory)
    except UsageError as error:
        assert "not a readable" in str(error) and suffix in (".parquet", ".arrow")
        return
    rows, problems = check_table(table, USUAL_COLUMNS, labelled=labelled)
    assert rows or problems
    assert all(re.match(r"x(, (line|row) [1-9]\d*)?: ", problem) for problem in problems)
    assert all("\0" not in text for row in rows for text in row.text)
    "".join(text for row in rows for text in row.text).encode()


CORPUS = {path: path.read_bytes() for path in sorted(fuzz.CORPUS.glob("*/*"))}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_bad_content_is_refused_in_one_sentence_that_names_it(write, name, content, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_domain(str(write(name, content)))
    assert name.split(".")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_column_is_named_with_the_flag_of_its_side(write):
    path = write("x.csv", "message,verdict\na,x\n")
    with pytest.raises(UsageError, match=r"no text column .*; it has 'message', 'verdict'; name one by --of-text"):
        load_domain(str(path), flag="--of-{}-column")
    with pytest.raises(UsageError, match=r"no text-pair column 'verdikt' \(did you mean 'verdict'\?\)"):
        load_domain(str(path), Columns(text_pair="verdikt"))


def test_parquet_that_is_not_utf8_is_refused(tmp_path):
    raw = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    pyarrow.parquet.write_table(pa.table({"text": raw, "label": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"x\.parquet: cannot be read \(not a readable Parquet file"):
        load_domain(str(tmp_path / "x.parquet"))


def test_many_problems_are_cut_short_and_point_to_check(write):
    path = write("x.jsonl", "nope\n" * 10)
    with pytest.raises(UsageError, match=r"line 1: .*line 2: .*line 3: .*and 7 more \(see `l2a domains check"):
        load_domain(str(path))


def test_pairs_in_one_split_only_are_refused(write):
    write("f/train.jsonl", "".join(json.dumps({"text": t, "text_pair": "p", "label": t}) + "\n" for t in "ab"))
    write("f/test.csv", "text,label\nc,a\n")
    with pytest.raises(UsageError, match="f: some splits have pairs of texts and some single ones"):
        load_domain("f")


def test_two_files_of_one_split_or_none_to_train_are_refused(write, tmp_path):
    for name in ("train", "dev", "valid"):
        write(f"f/{name}.csv", "text,label\na,x\n")
    with pytest.raises(UsageError, match=r"both dev\.csv and valid\.csv are dev files"):
        load_domain("f")
    with pytest.raises(UsageError, match="no training file"):
        load_domain(str(tmp_path))


@pytest.mark.parametrize("reference", ["gone.csv", "./gone", "movis", "no such thing"])
def test_what_does_not_exist_is_refused(reference):
    hint = r" \(did you mean 'movies'\?\)" if reference == "movis" else ""
    with pytest.raises(UsageError, match=f"no such card or path{hint}"):
        load_domain(reference)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_hostile_input_is_refused_or_read_and_nothing_escapes(path):
    fuzz.attempt(path.parent.name, CORPUS[path])


@given(st.sampled_from(list(CORPUS)), st.data())
def test_damaged_input_is_refused_or_read(path, data):
    """Some bytes of a file are replaced by those of another, or by any."""
    content, other = CORPUS[path], CORPUS[data.draw(st.sampled_from(list(CORPUS)))]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    put = data.draw(st.binary(max_size=8) | st.integers(0, len(other)).map(lambda place: other[place : place + 40]))
    fuzz.attempt(path.parent.name, content[:start] + put + content[end:])
