import gzip
import lzma
import os
import re
import tracemalloc

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, strategies as st

from l2a.data import bank as bank_module, readers
from l2a.data.bank import read_bank, sentences, unlabelled_files
from l2a.data.domains import as_domain
from l2a.data.examples import held_out_words, normalised_hash
from l2a.util import SILENT, UsageError, sha256_file
from tests.conftest import save_frame

TEXTS = [("one fine film",), ("zwei: schöne Filme",), ("three",)]
PAIRS = [("first", "second"), ("a b", "c d")]
FRAME = pd.DataFrame({"text": [text for (text,) in TEXTS]})
LONG = "one two three four five six seven eight nine ten. "


def read(reference, is_pair=False, **held_out):
    return list(read_bank([reference], is_pair, **held_out))


FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".feather", ".txt.gz", ".csv.xz", ".jsonl.bz2")


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_texts_in_order(tmp_path, suffix):
    path = save_frame(FRAME, tmp_path / f"x{suffix}")
    found = read_bank([str(path)], False)
    assert list(found) == TEXTS and len(found) == 3 and found[-1] == TEXTS[-1] and found[1:] == TEXTS[1:]
    assert list(found.files) == [path.name] and found.files == unlabelled_files([str(path)], None, SILENT)
    assert found.summary == "unlabelled: 3 texts of 1 file (nothing left out)"


KINDS = [
    [text for (text,) in TEXTS], TEXTS, FRAME, FRAME.to_dict("records"), Dataset.from_pandas(FRAME),
    DatasetDict(train=Dataset.from_pandas(FRAME), test=Dataset.from_dict({"text": ["left out"]})),
    {"train": TEXTS, "test": ["left out"]}, as_domain([(text, text[0], "train") for (text,) in TEXTS], "x"),
]  # fmt: skip


@pytest.mark.parametrize("data", KINDS)
def test_every_kind_of_data_in_memory_gives_the_same_texts(data):
    assert read(data) == TEXTS
    (digest,) = read_bank([data], False).files.values()
    assert len(digest) in (32, 64)


def test_files_of_one_name_are_told_apart(write):
    paths = [write(f"{folder}/x.txt", f"a text of {folder}\n") for folder in ("one", "two")]
    digests = [sha256_file(path) for path in paths]
    assert read_bank([*paths, paths[0]], False).files == {f"x.txt ({digest[:8]})": digest for digest in digests}


def test_pairs_come_from_two_columns_or_from_lines_with_a_tab(write):
    lines = "first\tsecond\n a b \t c d \n"
    named = "note,question1,question2\nx,first,second\nx,a b,c d\n"
    headed = f"premise\thypothesis\n{lines}"
    for name, content in (("x.txt", lines), ("x.tsv", lines), ("y.tsv", headed), ("y.csv", named)):
        assert read(write(name, content), is_pair=True) == PAIRS
    assert read(PAIRS, is_pair=True) == PAIRS


def test_texts_of_the_other_kind_are_left_out_and_counted(write):
    single, pair = write("x.txt", "alone\nand\talone\n"), write("y.txt", "a\tb\nc\td\n")
    found = read_bank([single, pair], False)
    assert list(found) == [("alone",), ("and\talone",)] and "2 texts of 2 files (2 pairs left out)" in found.summary
    assert list(read_bank([single, pair], True)) == [("a", "b"), ("c", "d")]
    with pytest.raises(UsageError, match=r"no text can be used \(2 single texts left out\); give pairs"):
        read(single, is_pair=True)


def test_the_training_rows_of_a_table_with_splits_are_read(write):
    assert read(write("x.csv", "text,label,split\na,x,train\nb,,valid\nc,x,test\nd,y,training\n")) == [("a",), ("d",)]


def test_a_folder_gives_its_files_but_for_dev_and_test_splits(write, tmp_path):
    for name in ("f/b.txt", "f/inner/a.txt.xz", "f/test.txt", "f/dev.jsonl", "f/.hidden.txt", "f/notes.md"):
        write(name, lzma.compress(b"packed") if name.endswith("xz") else f"text of {name}\n".encode())
    found = read_bank(["f"], False, data_root=tmp_path / "work")
    assert list(found) == [("text of f/b.txt",), ("packed",)]
    assert list(found.files) == ["f/b.txt", "f/inner/a.txt.xz"]


def test_saved_datasets_and_hub_ids_are_read(tmp_path, monkeypatch):
    (dataset := DatasetDict(train=Dataset.from_pandas(FRAME))).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr("datasets.load_dataset", lambda *_: dataset)
    assert read(tmp_path / "saved") == read("org/name") == TEXTS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_three_marks_alone(write, end):
    lines = ["one\u2028here", "two\x85here", "three\x0bhere", "four\x0chere"]
    content = ("\ufeff" + end.join([*lines, "", "  "])).encode()
    assert read(write("x.txt.gz", gzip.compress(content))) == [(line,) for line in lines]


def test_copies_and_held_out_texts_are_left_out_and_counted(write):
    path = write("x.txt", "A text\na  TEXT\nsecret\nSecret\nother\n")
    found = read_bank([path, path], False, frozenset({normalised_hash(("secret",))}))
    assert list(found) == [("A text",), ("other",)]
    assert "2 texts of 2 files (4 held out or near copies of held-out texts, 4 copies left out)" in found.summary


HELD_OUT = "The plot, in short, is thin but fun."


NEAR = [
    "the plot in short is THIN but fun!!", "I must say the plot in short is thin but fun and long",
    "plot in short is thin but", f"{LONG * 4} {HELD_OUT[:18]}. {HELD_OUT[18:]}", "so fun",
]  # fmt: skip
FAR = [
    "plot in short is thin", "the plot in short is thin and fun", "the plot, in short, is thin but funny",
    "so fun it is",
]  # fmt: skip


@pytest.mark.parametrize(("text", "is_near"), [*((text, True) for text in NEAR), *((text, False) for text in FAR)])
def test_near_copies_share_all_words_or_six_in_a_row_of_a_whole_text(text, is_near):
    found = read(["kept", text], held_out_words=held_out_words([(HELD_OUT,), ("So fun!",)]))
    assert found[0] == ("kept",) and (len(found) == 1) == is_near


def test_a_pair_with_a_held_out_side_is_left_out():
    words = held_out_words([("a man plays the old guitar", "yes")])
    pairs = [("A man plays the old guitar.", "no"), ("yes", "no"), ("no", "well, a man plays the old guitar")]
    assert read([*pairs, ("a man", "yes")], is_pair=True, held_out_words=words) == [("yes", "no"), ("a man", "yes")]


def test_no_piece_of_a_held_out_long_text_is_kept():
    text = " ".join(f"this is sentence number {i} of many." for i in range(12))
    with pytest.raises(UsageError, match=r"no text can be used \(1 held out or near copies"):
        read([text], forbidden=frozenset({normalised_hash((text.upper(),))}))
    altered = text.replace("number 3", "numero 3")
    assert read([altered], held_out_words=held_out_words([(text,)])) == [("this is sentence numero 3 of many.",)]


def test_long_texts_are_cut_at_the_ends_of_sentences():
    first = ['Mr. J. Smith saw it "twice."', "Was it good?", "Yes. It was, e.g. the end (really!)"]
    assert sentences(" ".join([*first, "and so on " * 12 + "ok."]))[:3] == first
    assert sentences("Short. It is. Left as it is.") == ["Short. It is. Left as it is."]


@given(st.lists(st.sampled_from(["a", "b.", "c!", '"d?"', "Mr.", "e", "f", "...", ")"]), min_size=1, max_size=300))
def test_pieces_have_all_words_and_three_to_sixty_of_them_each(words):
    pieces = sentences(" ".join(words))
    assert " ".join(pieces).split() == words
    assert len(words) <= 40 or all(3 <= len(piece.split()) <= 60 for piece in pieces)


def test_a_few_broken_lines_are_left_out_with_a_warning(write, caplog):
    path = write("x.txt", b"good\ncaf\xe9\nnul\0\nfine\n" + b"w" * 3_000_001 + b"\nlast\nmore\n")
    found = read_bank([path], False)
    assert list(found) == [("good",), ("fine",), ("last",), ("more",)] and "3 unreadable lines" in found.summary
    assert re.search("3 of 7 lines cannot be read and are left out: .*x.txt, line 2: not UTF-8", caplog.text)


def test_one_unreadable_row_of_a_table_does_not_stop_the_others(write):
    assert read(write("x.csv", 'text,n\na,1\n"b" c,2\nd,3,4\ne,5\n')) == [("a",), ("e",)]
    assert read(write("x.jsonl", '{"text": "a"}\nnope\n{"text": 5}\n{"text": "b"}\n')) == [("a",), ("b",)]
    assert read(write("x.tsv", 'text\tn\n"a ""b"""\t1\n"c\t3\n5" disk\t2\n')) == [('a "b"',), ('"c',), ('5" disk',)]


BAD = [
    ("empty.txt", b"", "the file is empty"),
    ("header.csv", b"text,label\n", "the file is empty"),
    ("picture.txt", bytes(range(256)) * 50, "line 1: NUL bytes.*; 51 of the first 51 lines cannot be read"),
    ("wide.txt", "text\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
    ("huge.txt", b"w" * 1_000_001, "line 1: .* holds 1000001 characters"),
    ("torn.txt.xz", lzma.compress(os.urandom(9999).hex().encode())[:-500], "cannot be read .*ended before"),
    ("column.csv", b"txt,label\na,x\n", r"no text column .*did you mean 'txt'"),
    ("table.xlsx", b"x", "files that end in '.xlsx' are not read here; give .txt, .csv"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, *_ in BAD])
def test_what_cannot_be_read_is_refused_in_one_sentence_and_leaves_nothing(write, cache, name, content, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(write(name, content))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not [entry for entry in cache.glob("banks/*") if entry.is_dir()]


WRONG = [
    ("gone.txt", "unlabelled 'gone.txt': no such card or path"),
    ("mroe.txt", r"did you mean 'more\.txt'"),
    ("movis", "did you mean 'movies'"),
    ("bare", "the folder holds no file of text; give .txt"),
    (5, "data of type int is not read; give a list"),
    (["a", 5, 6], "line 2: the column 'text' holds a value of type int.*; 2 of the first 3 lines"),
    ([("a", "b", "c")], "holds a value of type tuple instead of text"),
]


@pytest.mark.parametrize(("reference", "message"), WRONG)
def test_wrong_references_are_refused(write, reference, message):
    write("more.txt", "text\n")
    write("bare/picture.png", "x")
    with pytest.raises(UsageError, match=message):
        read(reference)


def test_a_bank_is_written_once_and_again_when_anything_that_decides_it_changes(write, cache, monkeypatch):
    path = write("x.txt", "a b\nc d\n")
    read(path)
    with monkeypatch.context() as patch:
        patch.setattr(bank_module, "_write", lambda *_: pytest.fail("written twice"))
        assert read(path) == [("a b",), ("c d",)]
    os.utime(path, (0, 0))
    write("x.txt", "a b\nc e\n")
    os.utime(path, (0, 0))
    assert read(path) == [("a b",), ("c e",)]
    assert read(path, forbidden=frozenset({normalised_hash(("a b",))})) == [("c e",)]
    assert read(path, held_out_words=frozenset({"c e"})) == [("a b",)]
    assert len([entry for entry in cache.glob("banks/*") if entry.is_dir()]) == 4


@pytest.mark.parametrize("suffix", [".txt.gz", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_files(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(readers, "WINDOW", 100)
    texts = pd.DataFrame({"text": [f"{i} {'w' * 2000}" for i in range(2000)]})
    path = save_frame(texts, tmp_path / f"x{suffix}")
    read_bank([["warm"]], False)
    tracemalloc.start()
    assert len(read_bank([path], False)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # the texts have 4,000,000 characters


def test_texts_know_the_file_they_were_read_from_first(write):
    contents = ("a fine film\na poor film\na fine film\n", "a poor film\na loud phone\n", "a fine film\n", "a kettle\n")
    bank = read_bank([write(f"{i}.txt", content) for i, content in enumerate(contents)], False)
    origins = [bank.origin_of(i) for i in range(len(bank))]
    assert origins == ["0.txt:0", "0.txt:1", "1.txt:2", "3.txt:3"], "2.txt has nothing of its own"
