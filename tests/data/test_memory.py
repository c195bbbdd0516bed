"""Data in memory are read like files."""

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

from l2a.config import Columns
from l2a.data.domains import as_domain, load_domain
from l2a.util.errors import UsageError

ROWS = [("fine", "good", "train"), ("awful", "bad", "train"), ("so fine", "good", "dev"), ("so bad", "bad", "test")]
FRAME = pd.DataFrame(ROWS, columns=["review", "label", "split"])
NAMED = Features({"review": Value("string"), "label": ClassLabel(names=["good", "bad"])})


def named(*rows):
    return Dataset.from_list([{"review": text, "label": label} for text, label in rows], features=NAMED)


KINDS = {
    "list": ROWS,
    "mappings": FRAME.to_dict("records"),
    "frame": FRAME,
    "categories": FRAME.astype({"label": "category"}),
    "dataset": Dataset.from_pandas(FRAME),
    "dictionary": DatasetDict(
        train=named(("fine", 0), ("awful", 1)), validation=named(("so fine", 0)), test=named(("so bad", 1))
    ),
    "mapping of lists": {"train": [row[:2] for row in ROWS[:2]], "dev": [ROWS[2][:2]], "test": [ROWS[3][:2]]},
}  # fmt: skip


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
def test_every_kind_of_data_gives_the_same_domain(data):
    domain = as_domain(data, "reviews")
    assert (domain.name, domain.label_names, domain.is_pair) == ("reviews", ("bad", "good"), False)
    assert domain.train.inputs == (("fine",), ("awful",)) and domain.train.labels.tolist() == [1, 0]
    assert domain.dev.inputs == (("so fine",),) and domain.test.reveal().inputs == (("so bad",),)
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


@pytest.mark.parametrize(
    ("data", "message"),
    [
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
    ],
)
def test_bad_data_are_refused(data, message):
    with pytest.raises(UsageError, match=message):
        as_domain(data, "x")
