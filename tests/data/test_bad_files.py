import importlib.util
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, strategies as st

from l2a.config import Columns
from l2a.data.domains import load_domain
from l2a.util.errors import UsageError

SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "benchmarks" / "fuzz.py")
FUZZ = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FUZZ)
CORPUS = {path: path.read_bytes() for path in sorted(FUZZ.CORPUS.glob("*/*"))}
BAD = [
    ("empty.csv", b"", "empty.csv: the file is empty"),
    ("blank.jsonl", b"\n \n", "blank.jsonl: the file is empty"),
    ("header.csv", b"text,label\n", "no rows; give a header and rows"),
    ("latin.csv", b"text,label\ngood,x\ncaf\xe9,y\n", r"latin.csv, line 3: not UTF-8 \(byte 0xe9 at column 4\)"),
    ("utf16.csv", "text,label\na,b\n".encode("utf-16"), "line 1: the file is UTF-16; save it as UTF-8"),
    ("nul.csv", b"text,label\na,x\nb\0,y\n", "nul.csv, line 3: NUL bytes"),
    ("nul.jsonl", b'{"text":"a\\u0000","label":"x"}\n', "line 1: the column 'text' holds NUL characters"),
    ("surrogate.jsonl", b'{"text":"a\\ud800","label":"x"}\n', "line 1: .*surrogate"),
    ("ragged.csv", b'text,label\n"a\nb",x\nc,d,y\n', "ragged.csv, line 4: 3 fields, the header has 2"),
    ("quote.csv", b'text,label\na,x\n"b" c,y\n', "quote.csv, line 3: a stray quote"),
    ("twice.csv", b"text,text,label\na,b,x\n", "line 1: the header names 'text' twice"),
    ("json.jsonl", b'{"text":"a","label":"x"}\n\nnope\n', "json.jsonl, line 3: not JSON"),
    ("list.jsonl", b'{"text":"a","label":"x"}\n["a", "x"]\n', "line 2: a JSON list, not an object"),
    ("column.csv", b"txt,label\na,x\n", r"no text column .*did you mean 'txt'.*'txt', 'label'.*--text-column"),
    ("no_label.csv", b"text,x\na,x\n", "no label column .*--label-column"),
    ("void.csv", b"text,label\n ,x\n", "line 2: the column 'text' is empty"),
    ("unlabelled.csv", b"text,label\na,x\nb,\n", "line 3: the column 'label' has no label"),
    ("nan_text.csv", b"text,label\na,x\nb,NaN\n", r"line 3: .* 'label' has no label \('NaN' marks a missing one\)"),
    ("semicolons.csv", b"text;label\na, b;x\n", "line 1: the columns are separated by ';'; use commas in .csv files"),
    ("tabs.csv", b"text\tlabel\na\tx\n", r"the columns are separated by '\\t'"),
    ("broken.csv.gz", b"\x1f\x8bnope", r"broken.csv.gz: cannot be read .*; check"),
    ("broken.csv.xz", b"nope", r"broken.csv.xz: cannot be read"),
    ("object.json", b'{\n"text": "a"\n}', "row 1: not JSON .*; write one object per line, or a list"),
    ("items.json", b'[{"text":"a","label":"x"}, 5]', "row 2: a JSON int, not an object"),
    ("broken.arrow", b"ARROW1nope", r"broken.arrow: cannot be read \(not a readable Arrow file"),
    ("nan.jsonl", b'{"text":"a","label":NaN}\n', "line 1: the column 'label' has no label"),
    ("number.jsonl", b'{"text":5,"label":"x"}\n', "line 1: the column 'text' holds a value of type int"),
    ("labels.jsonl", b'{"text":"a","label":["x","y"]}\n', "line 1: the column 'label' holds a value of type list"),
    ("half_pair.jsonl", b'{"text":"a","text_pair":"b","label":"x"}\n{"text":"c","label":"x"}\n', "line 2: .*text_pair"),
    ("split.csv", b"text,label,split\na,x,train\nb,y,trian\n", "line 3: the split 'trian' .*did you mean 'train'"),
    ("one.csv", b"text,label,split\na,x,train\nb,x,train\n", "train has one class only, 'x'; give at least two"),
    ("no_train.csv", b"text,label,split\na,x,test\nb,y,test\n", "no training rows; give at least two classes"),
    ("label.csv", b"text,label,split\na,x,train\nb,y,train\nc,Y,test\n", "test has the label 'Y', which train lacks"),
    ("huge.csv", b"text,label\n" + b"x" * 1_000_001 + b",x\n", "line 2: .*1000001 characters, at most 1000000"),
    ("bad.parquet", b"PAR1nonsense", r"bad.parquet: cannot be read \(not a readable Parquet file"),
    ("empty.parquet", b"", "empty.parquet: the file is empty"),
    ("table.xlsx", b"x", r"end in '.xlsx' are not read here; .*read_excel\(.*table.xlsx'\).to_csv\(.*table.csv'"),
    ("table.ods.txt", b"x", r"files that end in '.txt' are not read here; give .csv, .tsv, .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, _, _ in BAD])
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
    FUZZ.attempt(path.parent.name, CORPUS[path])


@given(st.sampled_from(list(CORPUS)), st.data())
def test_damaged_input_is_refused_or_read(path, data):
    """Some bytes of a file are replaced by those of another, or by any."""
    content, other = CORPUS[path], CORPUS[data.draw(st.sampled_from(list(CORPUS)))]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    put = data.draw(st.binary(max_size=8) | st.integers(0, len(other)).map(lambda place: other[place : place + 40]))
    FUZZ.attempt(path.parent.name, content[:start] + put + content[end:])
