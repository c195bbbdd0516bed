"""Names of classes stand over their numbers, wherever the names lie."""

import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from l2a.data.domains import load_domain
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
        pa.feather.write_feather(data.data.table, path)
    else:
        data.save_to_disk(path)


def labels_of(domain):
    return {
        text: domain.label_names[label] for (text,), label in zip(domain.train.inputs, domain.train.labels, strict=True)
    }


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "x.arrow", "x.feather", "saved"])
def test_two_files_with_the_classes_in_another_order_are_matched_by_name(tmp_path, name):
    domains = []
    for folder, names in (("one", ["bad", "good"]), ("other", ["good", "bad"])):
        (tmp_path / folder).mkdir()
        save(dataset(names), tmp_path / folder / name)
        domains.append(load_domain(str(tmp_path / folder / name)))
    source, target = align_labels(*domains)
    assert labels_of(source) == labels_of(target) == {text: label for text, label in TEXTS if text in labels_of(target)}
    assert source.label_names == ("bad", "good")


def test_columns_of_categories_give_their_names(tmp_path):
    labels = pa.DictionaryArray.from_arrays([1, 0, 1], ["good", "bad"])
    table = pa.table({"text": ["a", "b", "c"], "label": labels, "split": ["train"] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert labels_of(load_domain(str(tmp_path / "x.parquet")))["b"] == "good"


def test_a_column_of_names_is_read_before_one_of_numbers(write):
    path = write("x.csv", "text,label,label_text,split\na,1,good,train\nb,0,bad,train\nc,1,good,train\n")
    assert load_domain(str(path)).label_names == ("bad", "good")


def test_numbers_on_one_side_and_names_on_the_other_are_refused(tmp_path, write):
    dataset(["bad", "good"]).to_parquet(tmp_path / "named.parquet")
    numbered = load_domain(str(write("numbered.csv", "text,label,split\na,0,train\nb,1,train\n")))
    message = "numbered has the labels 0, 1 and named has bad, good; .*give names in both"
    with pytest.raises(UsageError, match=message):
        align_labels(load_domain(str(tmp_path / "named.parquet")), numbered)


def test_splits_with_numbers_and_names_and_a_number_without_a_name_are_refused(write, tmp_path):
    write("f/test.jsonl", json.dumps({"text": "a", "label": 1}) + "\n")
    named = dataset(["bad", "good"])
    named.to_parquet(tmp_path / "work/f/train.parquet")
    with pytest.raises(UsageError, match="test has the label '1', which train lacks"):
        load_domain("f")
    table = named.data.table.set_column(1, "label", pa.array([0, 1, 7, 0]))
    table = table.replace_schema_metadata(named.data.schema.metadata)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"x\.parquet, row 3: the class 7 of 'label' has no name; the data name"):
        load_domain(str(tmp_path / "x.parquet"))
