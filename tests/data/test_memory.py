"""Data in memory, those of the datasets library too, are read like files."""

from unittest.mock import Mock

import datasets
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

from l2a.config import Columns
from l2a.data.domains import as_domain, load_domain
from l2a.util.errors import RunError, UsageError

ROWS = [("fine", "good", "train"), ("awful", "bad", "train"), ("so fine", "good", "dev"), ("so bad", "bad", "test")]
FRAME = pd.DataFrame(ROWS, columns=["review", "label", "split"])
NAMED = Features({"review": Value("string"), "label": ClassLabel(names=["good", "bad"])})


def dataset(*rows):
    return Dataset.from_list([{"review": text, "label": label} for text, label in rows], features=NAMED)


TRAIN = dataset(("fine", 0), ("awful", 1))
KINDS = {
    "list": ROWS,
    "mappings": FRAME.to_dict("records"),
    "frame": FRAME,
    "categories": FRAME.astype({"label": "category"}),
    "dataset": Dataset.from_pandas(FRAME),
    "dictionary": DatasetDict(train=TRAIN, validation=dataset(("so fine", 0)), test=dataset(("so bad", 1))),
    "mapping of lists": {"train": [row[:2] for row in ROWS[:2]], "dev": [ROWS[2][:2]], "test": [ROWS[3][:2]]},
}  # fmt: skip


def assert_reviews(domain):
    assert (domain.name, domain.label_names, domain.is_pair) == ("reviews", ("bad", "good"), False)
    assert domain.train.inputs == (("fine",), ("awful",)) and domain.train.labels.tolist() == [1, 0]
    assert domain.dev.inputs == (("so fine",),) and domain.test.reveal().inputs == (("so bad",),)


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
def test_every_kind_of_data_gives_the_same_domain(data):
    domain = as_domain(data, "reviews")
    assert_reviews(domain)
    assert load_domain(data).train.inputs == domain.train.inputs and load_domain(domain) is domain


def test_lists_of_pairs_and_integer_labels_are_read():
    domain = as_domain([((f"premise {i}", f"hypothesis {i}"), i % 2) for i in range(40)], "pairs")
    assert domain.is_pair and domain.label_names == ("0", "1")
    assert len(domain.train) + len(domain.dev) + domain.test.size == 40


def test_the_content_decides_the_hash():
    changed = [("Fine", *ROWS[0][1:]), *ROWS[1:]]
    assert as_domain(ROWS, "x").files == as_domain(list(ROWS), "x").files != as_domain(changed, "x").files


def test_columns_of_a_frame_can_be_named():
    frame = FRAME.rename(columns={"review": "body", "label": 5})
    with pytest.raises(UsageError, match=r"x: no text column .*it has 'body', '5', 'split'"):
        as_domain(frame, "x")
    assert as_domain(frame, "x", Columns(text="body", label="5")).label_names == ("bad", "good")


BAD = [
    ([("a", "x"), ("b", None)], "x, row 2: the column 'label' has no label"),
    ([("a", "x"), (("b", "c"), "y")], "x, row 1: the column 'text_pair' is empty"),
    ([("a", "x"), "bc"], r"x, row 2: 'bc' is not read; give \(text, label\)"),
    ([(("a", "b", "c"), "x")], r"x, row 1: .* is not read; give \(text, label\)"),
    ([("a", "x", "train", 1)], r"x, row 1: .* is not read; give \(text, label\)"),
    ([("a", "x", "trian")], "x, row 1: the split 'trian' is not known"),
    (pd.DataFrame({"text": ["a", "b"], "label": ["x", pd.NA]}), "x, row 2: the column 'label' has no label"),
    (pd.DataFrame({"text": ["a", "b"], "label": [0.0, float("nan")]}), "x, row 2: the column 'label' has no label"),
    ([], "x: no rows"),
    (3, "x: data of type int is not read; give a list"),
    (IterableDataset.from_generator(lambda: iter([])), "x: data of type IterableDataset is not read"),
    ({"text": ["a"], "label": ["x"]}, "x: no labelled rows"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_bad_data_are_refused(data, message):
    with pytest.raises(UsageError, match=message):
        as_domain(data, "x")


@pytest.fixture
def hub(monkeypatch):
    """Replace the Hub, to return one answer or fail."""
    monkeypatch.setattr(datasets, "load_dataset", hub := Mock())
    return hub


def test_a_saved_dictionary_keeps_its_splits_and_class_names(tmp_path):
    KINDS["dictionary"].save_to_disk(tmp_path / "reviews")
    assert_reviews(load_domain(str(tmp_path / "reviews")))


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    TRAIN.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(UsageError, match="not a readable saved dataset"):
        load_domain(str(tmp_path / "saved"))


@pytest.mark.parametrize(("reference", "asked"), [("glue:sst2", ("glue", "sst2")), ("org/name", ("org/name", None))])
def test_a_hub_id_names_a_dataset_and_a_config(hub, reference, asked):
    hub.return_value = DatasetDict(train=TRAIN, test=dataset(("d", 0)))
    assert load_domain(reference).name == reference
    hub.assert_called_once_with(*asked)


def test_a_split_without_labels_counts_as_missing_but_a_single_missing_label_is_a_problem(hub):
    hub.return_value = DatasetDict(train=TRAIN, test=dataset(("d", -1), ("e", -1)))
    assert load_domain("org/name").test.size == 0
    hub.return_value = DatasetDict(train=dataset(("a", 1), ("b", 0), ("c", -1)))
    with pytest.raises(UsageError, match="org/name train, row 3: the column 'label' has no label"):
        load_domain("org/name")


def test_unknown_splits_are_left_out_with_a_warning(hub, caplog):
    hub.return_value = DatasetDict(train=TRAIN, unsupervised=dataset(("d", 0)))
    domain = load_domain("org/name")
    assert len(domain.train) == 2 and "the split 'unsupervised' is ignored" in caplog.text


FAILURES = [
    (datasets.exceptions.DatasetNotFoundError("gone\nmore"), UsageError, r"no dataset of the Hub \(gone more\)"),
    (ValueError("Config name is missing: pick a, b"), UsageError, "Config name is missing: pick a, b.*name:config"),
    (ConnectionError("no route"), RunError, r"cannot give this dataset and it is not cached \(no route\)"),
    (RuntimeError("Dataset scripts are no longer supported"), RunError, "no longer supported"),
]


@pytest.mark.parametrize(("error", "kind", "message"), FAILURES)
def test_failures_of_the_hub_are_one_sentence(hub, error, kind, message):
    hub.side_effect = error
    with pytest.raises(kind, match=message) as caught:
        load_domain("org/name")
    assert "\n" not in str(caught.value)
