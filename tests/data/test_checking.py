"""Whatever is wrong with a file is said at once; names of classes stand over their numbers."""

import re
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import feather, parquet
from typer.testing import CliRunner

from l2a.cli.app import domains_app
from l2a.data.domains import load_domain, read_domain
from l2a.data.examples import align_labels
from l2a.util.errors import UsageError

TEXTS = [("bad 1", "bad"), ("good 1", "good"), ("good 2", "good"), ("bad 2", "bad")]


def dataset(names, texts=TEXTS):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names), "split": Value("string")})
    rows = [{"text": text, "label": names.index(label), "split": "train"} for text, label in texts]
    return Dataset.from_list(rows, features=features)


def save(data, path):
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.name == "stream.arrow":
        with pa.ipc.new_stream(path, data.data.schema) as writer:
            writer.write_table(data.data.table)
    elif path.suffix in (".arrow", ".feather"):
        feather.write_feather(data.data.table, path)
    else:
        data.save_to_disk(path)


def labels_of(part):
    return {text: part.label_names[label] for (text,), label in zip(part.inputs, part.labels, strict=True)}


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "x.arrow", "x.feather", "saved"])
def test_two_files_with_the_classes_in_another_order_are_matched_by_name(tmp_path, name):
    domains = []
    for folder, names in (("one", ["bad", "good"]), ("other", ["good", "bad"])):
        (tmp_path / folder).mkdir()
        save(dataset(names), tmp_path / folder / name)
        domains.append(load_domain(str(tmp_path / folder / name)))
    source, target = align_labels(*domains)
    found = labels_of(target.train)
    assert labels_of(source.train) == found == {text: label for text, label in TEXTS if text in found}
    assert source.label_names == ("bad", "good")


def test_columns_of_categories_give_their_names(tmp_path):
    labels = pd.Categorical.from_codes([1, 0, 1], ["good", "bad"])
    pd.DataFrame({"text": ["a", "b", "c"], "label": labels, "split": "train"}).to_parquet(tmp_path / "x.parquet")
    assert labels_of(load_domain(str(tmp_path / "x.parquet")).train)["b"] == "good"


def test_a_column_of_names_is_read_before_one_of_numbers(write):
    path = write("x.csv", "text,label,label_text,split\na,1,good,train\nb,0,bad,train\nc,1,good,train\n")
    assert load_domain(str(path)).label_names == ("bad", "good")


def test_numbers_on_one_side_and_names_on_the_other_are_refused(make_domain):
    domains = make_domain({"bad": 1, "good": 1}, {}, {}, "named"), make_domain({"0": 1, "1": 1}, {}, {}, "numbered")
    with pytest.raises(UsageError, match=r"numbered has the labels 0, 1 and named has bad, good; .*give names in both"):
        align_labels(*domains)


def test_splits_with_numbers_and_names_and_a_number_without_a_name_are_refused(write, tmp_path):
    named = dataset(["bad", "good"])
    named.to_parquet(write("f/test.jsonl", '{"text": "a", "label": 1}\n').with_name("train.parquet"))
    with pytest.raises(UsageError, match="test has the label '1', which train lacks"):
        load_domain("f")
    table = named.data.table.set_column(1, "label", pa.array([0, 1, 7, 0]))
    parquet.write_table(table.replace_schema_metadata(named.data.schema.metadata), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"x\.parquet, row 3: the class 7 of 'label' has no name; the data name"):
        load_domain(str(tmp_path / "x.parquet"))


def test_labels_are_matched_by_name_in_every_split(make_domain):
    source = make_domain({"positive": 2, "negative": 3}, {"positive": 1, "negative": 2}, {"positive": 2, "negative": 1})
    target = make_domain({"negative": 1, "positive": 1}, {"negative": 1, "positive": 1}, {"negative": 1, "positive": 1})
    aligned, same = align_labels(source, target)
    assert same is target and aligned.label_names == aligned.train.label_names == target.label_names
    parts = [[labels_of(part) for part in (one.train, one.dev, one.test.reveal())] for one in (aligned, source)]
    assert parts[0] == parts[1] and aligned.train.labels.tolist() == [1, 1, 0, 0, 0]
    assert aligned.test.hashes == source.test.hashes


def test_a_label_that_one_domain_lacks_is_named(make_domain):
    source = make_domain({"Negative": 1, "positive": 1}, {"Negative": 1}, {"Negative": 1}, name="films")
    target = make_domain({"negative": 1, "positive": 1}, {"negative": 1}, {"negative": 1}, name="posts")
    message = r"posts lacks the label 'Negative' of films \(did you mean 'negative'\?\); films lacks the label 'nega"
    with pytest.raises(UsageError, match=message):
        align_labels(source, target)


def test_pairs_and_single_texts_do_not_go_together(make_domain):
    domain = make_domain({"a": 1, "b": 1}, {"a": 1}, {"a": 1}, name="single")
    with pytest.raises(UsageError, match="pairs has pairs of texts and single single ones"):
        align_labels(replace(domain, is_pair=True, name="pairs"), domain)


GOOD = "text,label,split\none two,x,train\nONE  two,x,train\nthree,y,train\nthree,x,dev\nfour,y,dev\none two,x,test\n"


def invoke(*arguments):
    return CliRunner().invoke(domains_app, list(arguments))


def test_a_report_counts_sizes_labels_lengths_and_copies(write):
    found = read_domain(str(write("x.csv", GOOD)))
    assert (found.name, found.is_pair, found.label_names, found.problems) == ("x", False, ("x", "y"), [])
    assert [found.counts(split)["examples"] for split in ("train", "dev", "test")] == [3, 2, 1]
    assert found.counts("train") == {
        "examples": 3, "label x": 2, "label y": 1, "words, median": 2, "words, longest": 2, "characters, longest": 8,
        "duplicates": 1,
    }  # fmt: skip
    assert [*found.notes()] == [
        "1 texts of train are also in dev; copies are drawn once",
        "1 texts of train are also in test; they are never drawn for training",
        "1 texts have different labels in different rows",
    ]


def test_a_report_names_every_bad_line_and_counts_the_others(write):
    found = read_domain(str(write("x.csv", "text,label\na,x\n,y\nb,\nc,y,z\nd,x\n")))
    assert [problem.partition(":")[0].rpartition(" ")[2] for problem in found.problems] == ["3", "4", "5"]
    assert sum(found.counts(split)["examples"] for split in ("train", "dev", "test") if found.of(split)) == 2


def test_check_prints_the_numbers_and_the_overlap(write):
    result = invoke("check", str(write("x.csv", GOOD)))
    assert result.exit_code == 0
    for expected in ("single texts, labels: x, y", "label x", "2 (67%)", "1 texts of train are also in test",
                     "1 texts have different labels", "nothing is wrong"):  # fmt: skip
        assert expected in result.output


def test_check_exits_2_and_shows_problems_by_line_up_to_fifty(write):
    result = invoke("check", str(write("x.jsonl", "nope\n" * 60)))
    assert result.exit_code == 2 and "line 50:" in result.output and "line 51:" not in result.output
    assert "and 10 more problems" in result.output


def test_check_takes_columns_and_shows_brackets_as_they_are(write):
    path = str(write("x.csv", "a,b,c,split\nt1,t2,[b],train\nt5,t6,[/d],train\n"))
    result = invoke("check", path, "--text-column", "a", "--text-pair-column", "b", "--label-column", "c")
    assert result.exit_code == 0 and "pairs of texts, labels: [/d], [b]" in result.output
    assert "can only be a source" in result.output


def test_list_and_show_need_no_network(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("COLUMNS", "200")
    listed, shown = invoke("list"), invoke("show", "tweets")
    assert all(name in listed.output for name in ("movies", "products", "editorials", "tweets"))
    assert "vaderSentiment 3.3.2 (sdist)" in shown.output and "MIT" in shown.output


def test_a_foreign_file_among_the_cards_is_left_out_with_a_note_and_a_card_of_ones_own_hides_no_shipped_one(
    write, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "1000")
    write("domains/app.yaml", "server: {port: 80}\n")
    write("domains/broken.yaml", "a: [")
    for name in ("mine", "tweets"):  # a shipped card is never hidden
        write(
            f"domains/{name}.yaml",
            f"{{name: {name}, description: MINE, task: t, labels: [x], licence: l, data: p.csv}}",
        )
    result = invoke("list")
    assert result.exit_code == 0 and "tweets" in result.output and "mine" in result.output
    assert re.search(r"note: skipped.*app\.yaml.*note: skipped.*broken\.yaml", result.output, re.DOTALL)
    assert result.output.count("MINE") == 1 and "MINE" not in invoke("show", "tweets").output


def test_the_list_wraps_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = invoke("list").output.splitlines()
    assert max(map(len, lines)) <= 40 and any(line.startswith("editorials  ") for line in lines)
    assert any(line.rstrip().endswith("labels: negative, positive") for line in lines)
