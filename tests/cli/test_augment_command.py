import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from transformers import BertForMaskedLM

import l2a.generator.operators as words_module
import l2a.pipeline.augment as augment_file_module
from l2a.pipeline.augment import AugmentJob, augment_file
from l2a.util import UsageError, files
from tests.conftest import make_examples, tiny_bert_config

from .conftest import stopped_after


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text[0] for text in make_examples(25).inputs) + "\n")
    return path


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.mark.parametrize("operator", ["augpro_mix", "source"])
def test_a_file_becomes_a_file(run, texts, encoder_folder, tmp_path, operator):
    out, source, other = tmp_path / "new.jsonl", tmp_path / "source.csv", [t for (t,) in make_examples(40, 3).inputs]
    pd.DataFrame({"text": other}).to_csv(source, index_label="id")
    request = f"augment {texts} {out} --operator {operator} --source {source} --teacher {encoder_folder}"
    code, shown, err = run(*request.split(), "--copies", "2", "--degree", "0.5", "--batch-size", "8", "--seed", "5")
    assert code == 0 and "50 texts" in shown, err
    rows, old = read(out), texts.read_text().splitlines()
    assert len(rows) == 50
    assert {row["operator"] for row in rows} == {operator} and {row["seed"] for row in rows} == {5}
    assert {row["degree"] for row in rows} == {0.0 if operator == "source" else 0.5}
    if operator == "source":
        assert all(row["text"] == other[row["origin"]] for row in rows)
    else:
        assert [row["origin"] for row in rows] == [*range(25), *range(25)]
        assert any(row["text"] != old[row["origin"]] for row in rows)
        for row in rows:
            before, after = old[row["origin"]].split(), str(row["text"]).split()
            changed = sum(one != new for one, new in zip(before, after, strict=True))
            assert row["changed_share"] == pytest.approx(changed / len(before), abs=1e-5)
    assert not list(tmp_path.glob(".*"))


def job(texts: Path, out: Path, encoder_folder: Path, **changes: object) -> AugmentJob:
    settings = {"operator": "knn", "degree": 0.5, "copies": 2, "batch_size": 4, "teacher": str(encoder_folder)}
    return AugmentJob(texts, out, **{**settings, **changes})


@pytest.mark.usefixtures("saved_after_every_step")
def test_an_interrupted_job_leaves_what_was_there(texts, encoder_folder, tmp_path, monkeypatch):
    encoder_folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    out, original = tmp_path / "out.parquet", augment_file_module._line_maker
    out.write_text("old")
    kept = tmp_path / f".{out.name}{files.CHECKPOINT}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(augment_file_module, "_line_maker", lambda *job: stopped_after(2, original(*job)))
        augment_file(job(texts, out, encoder_folder, overwrite=True))
    with pytest.raises(UsageError, match='"seed": "0" there, "seed": "1" here'):
        augment_file(job(texts, out, encoder_folder, overwrite=True, seed=1))
    weights = (encoder_folder / "model.safetensors").read_bytes()
    (encoder_folder / "model.safetensors").write_bytes(weights[:-1] + b"\x01")
    with pytest.raises(UsageError, match=r'model.safetensors": "\w+" there'):
        augment_file(job(texts, out, encoder_folder, overwrite=True))
    (encoder_folder / "model.safetensors").write_bytes(weights)
    with (kept / "made").open("a+b") as lines:
        lines.seek(0)
        assert out.read_text() == "old" and len(lines.readlines()) == 8
        lines.write(b"torn")  # written after the last state
    augment_file(job(texts, out, encoder_folder, overwrite=True))
    whole = tmp_path / "whole.parquet"
    augment_file(job(texts, whole, encoder_folder))
    assert out.read_bytes() == whole.read_bytes() and not kept.exists()


def test_an_output_that_is_read_or_there_is_refused(run, texts, tmp_path):
    rows, link = tmp_path / "rows.jsonl", tmp_path / "link.jsonl"
    rows.write_text('{"text": "a good film"}\n')
    link.symlink_to(rows)
    before, itself, also = rows.read_bytes(), [rows, rows, "--overwrite"], ["--source", rows, "--overwrite"]
    for arguments in ([texts, rows], itself, [rows, link, "--overwrite"], [texts, rows, *also]):
        code, _, err = run("augment", *map(str, arguments))
        said = "read by the same command" if "--overwrite" in arguments else "--overwrite"
        assert code == 2 and said in err and rows.read_bytes() == before


def test_columns_of_either_side_can_be_named(run, encoder_folder, tmp_path, monkeypatch):
    (tmp_path / "in.csv").write_text("body,text\ngood film,wrong\n")
    (tmp_path / "from.csv").write_text("review,text\nbad story,wrong\n")
    monkeypatch.chdir(tmp_path)
    request = f"augment in.csv o.jsonl --degree 1 --source from.csv --teacher {encoder_folder} --text-column"
    code, _, err = run(*request.split(), "body")
    assert code == 2 and "from.csv" in err and "--source-text-column" in err
    code, _, err = run(*request.split(), "boddy", "--source-text-column", "review")
    assert code == 2 and "did you mean 'body'" in err and "--text-column" in err
    code, _, err = run(*request.split(), "body", "--source-text-column", "review")
    assert code == 0, err
    assert [row["text"] for row in read(tmp_path / "o.jsonl")] == ["bad story"]


ODD = ['a "good" film \\ bad\tstory', "caf\u00e9 good\u2028bad \u0007", "\U0001f600 lovely", "!!", "Fine GOOD Story"]


@pytest.mark.parametrize(("operator", "pairs"), [("augpro_mix", True), ("knn", False)])
def test_a_file_too_large_to_be_kept_gives_the_same_lines(encoder_folder, tmp_path, monkeypatch, operator, pairs):
    path, sides = tmp_path / "odd.jsonl", ("text", "text_pair")[: 1 + pairs]
    rows = [dict(zip(sides, both, strict=False)) for both in zip(ODD, ODD[::-1], strict=True)]
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


def test_pairs_stay_pairs(encoder_folder, tmp_path):
    pairs = make_examples(12, pairs=True).inputs
    path, out = tmp_path / "pairs.csv", tmp_path / "new.parquet"
    pd.DataFrame(pairs, columns=["sentence1", "sentence2"]).to_csv(path, index=False)
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
    glove = Mock(side_effect=lambda words: [["zebra"]] * len(words))
    monkeypatch.setattr(words_module, "load_glove", lambda *_: glove)
    for folder, out in ((tmp_path / "masked", "with.jsonl"), (encoder_folder, "without.jsonl")):
        glove.reset_mock()
        augment_file(job(texts, tmp_path / out, folder, operator="tinybert", degree=1.0, copies=1))
        made = " ".join(str(row["text"]) for row in read(tmp_path / out))
        asked = any(words for (words,), _ in glove.call_args_list)
        assert ("zebra" in made) == asked == (folder == encoder_folder)
        assert any(row["changed_share"] > 0 for row in read(tmp_path / out))


def test_augpro_fgsm_reads_two_classifiers(texts, classifier_folder, tmp_path):
    out, student = tmp_path / "new.jsonl", str(classifier_folder)
    augment_file(job(texts, out, classifier_folder, operator="augpro_fgsm", student=student, copies=1))
    assert any(row["changed_share"] > 0 for row in read(out))
