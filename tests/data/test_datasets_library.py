import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from l2a.config import Columns
from l2a.data.domains import load_domain
from l2a.util.errors import RunError, UsageError

FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=["neg", "pos"])})


def dataset(*rows):
    return Dataset.from_list([{"sentence": text, "label": label} for text, label in rows], features=FEATURES)


@pytest.fixture
def hub(monkeypatch):
    """Replace the Hub by one answer, and remember what was asked."""
    asked = []

    def install(answer):
        def load_dataset(name, config):
            asked.append((name, config))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return install


def test_a_saved_dictionary_keeps_its_splits_and_class_names(tmp_path):
    parts = {"train": dataset(("a", 1), ("b", 0)), "validation": dataset(("c", 1)), "test": dataset(("d", 0))}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    domain = load_domain(str(tmp_path / "saved"))
    assert domain.name == "saved" and domain.label_names == ("neg", "pos")
    assert domain.train.inputs == (("a",), ("b",)) and domain.train.labels.tolist() == [1, 0]
    assert domain.dev.inputs == (("c",),) and domain.test.reveal().inputs == (("d",),)


def test_a_saved_single_dataset_is_cut_by_hash(tmp_path):
    dataset(*((f"text {i}", i % 2) for i in range(300))).save_to_disk(tmp_path / "saved")
    domain = load_domain(str(tmp_path / "saved"))
    assert len(domain.train) + len(domain.dev) + domain.test.size == 300 and len(domain.train) > 170


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    dataset(("a", 1), ("b", 0)).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(UsageError, match="not a readable saved dataset"):
        load_domain(str(tmp_path / "saved"))


@pytest.mark.parametrize(("reference", "asked"), [("glue:sst2", ("glue", "sst2")), ("org/name", ("org/name", None))])
def test_a_hub_id_names_a_dataset_and_a_config(hub, reference, asked):
    calls = hub(DatasetDict({"train": dataset(("a", 1), ("b", 0)), "test": dataset(("d", 0))}))
    assert load_domain(reference).name == reference
    assert calls == [asked]


def test_a_split_without_labels_counts_as_missing(hub):
    hub(DatasetDict({"train": dataset(("a", 1), ("b", 0)), "test": dataset(("d", -1), ("e", -1))}))
    assert load_domain("org/name").test.size == 0


def test_a_single_missing_label_is_a_problem(hub):
    hub(DatasetDict({"train": dataset(("a", 1), ("b", 0), ("c", -1))}))
    with pytest.raises(UsageError, match="org/name train, row 3: the column 'label' has no label"):
        load_domain("org/name")


def test_unknown_splits_are_left_out_with_a_warning(hub, caplog):
    hub(DatasetDict({"train": dataset(("a", 1), ("b", 0)), "unsupervised": dataset(("d", 0))}))
    domain = load_domain("org/name")
    assert len(domain.train) == 2 and "the split 'unsupervised' is ignored" in caplog.text


def test_columns_of_a_hub_dataset_can_be_named(hub):
    renamed = dataset(("a", 1), ("b", 0)).rename_column("sentence", "body")
    hub(DatasetDict({"train": renamed, "test": renamed}))
    with pytest.raises(UsageError, match="no text column"):
        load_domain("org/name")
    assert load_domain("org/name", Columns(text="body")).label_names == ("neg", "pos")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("gone\nmore"), UsageError, r"no dataset of the Hub \(gone more\)"),
        (ValueError("Config name is missing: pick a, b"), UsageError, "Config name is missing: pick a, b.*name:config"),
        (ConnectionError("no route"), RunError, r"cannot give this dataset and it is not cached \(no route\)"),
        (RuntimeError("Dataset scripts are no longer supported"), RunError, "no longer supported"),
    ],
)
def test_failures_of_the_hub_are_one_sentence(hub, error, kind, message):
    hub(error)
    with pytest.raises(kind, match=message) as caught:
        load_domain("org/name")
    assert "\n" not in str(caught.value)
