import pytest
import yaml
from huggingface_hub import ModelCard

from l2a.config import DistillConfig, TeacherConfig
from l2a.report.run_folder import model_card
from tests.report.conftest import make_row

METRICS = {"labels_used": 128, "parameter_share": 0.127, "threads": 2, "seed": 4, "command": "l2a distill --seed 4",
           "student": "l2a_student", "validation_log_likelihood": {"plain_kd_student": -0.42, "l2a_student": -0.4},
           "versions": {"python": "3.11.9", "torch": "2.13.0"}}  # fmt: skip


def card(rows, teacher="minilm-l6", is_pair=False, model="student", **changes):
    config = DistillConfig(source="movies", target="tweets", teacher=TeacherConfig(model=teacher))
    return model_card(config, ("negative", "positive"), is_pair, rows, {**METRICS, **changes}, model)


def test_header_is_what_a_hub_reads(rows):
    data = ModelCard(card(rows)).data
    assert data.pipeline_tag == "text-classification"
    assert data.library_name == "transformers"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.license is None


@pytest.mark.parametrize(
    ("teacher", "base"), [("google/bert", "google/bert"), ("/models/bert", None), ("./bert", None)]
)
def test_base_model_is_a_hub_id_or_absent(rows, teacher, base):
    assert ModelCard(card(rows, teacher)).data.base_model == base


def test_a_relative_folder_is_no_base_model(rows, tmp_path, monkeypatch):
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    header = card(rows, "models/bert").split("---")[1]
    assert "base_model" not in yaml.safe_load(header)


def test_rows_that_beat_the_student_are_named(rows):
    text = card(rows)
    assert "More accurate than l2a_student on this test split: plain_kd_student (80.0%)." in text
    assert "tfidf_logreg (" not in text
    assert "No row was more accurate than plain_kd_student" in card(rows, student="plain_kd_student")
    assert "No row was more accurate" in card([make_row("tfidf_logreg", 0.7), make_row("l2a_student", 0.7)])


def test_card_tells_how_to_repeat_the_run(rows):
    text = card(rows)
    for fact in (
        "l2a distill --seed 4",
        "128 labelled",
        "12.7%",
        "torch 2.13.0",
        "| l2a_student |",
        "negative, positive",
    ):
        assert fact in text


@pytest.mark.parametrize("is_pair", [False, True])
def test_the_snippet_runs_where_the_card_lies(rows, student, tokenizer, tmp_path, monkeypatch, capsys, is_pair):
    for folder, model in ((tmp_path, "student"), (tmp_path / "student", ".")):
        student.save_pretrained(tmp_path / "student")
        tokenizer.save_pretrained(tmp_path / "student")
        monkeypatch.chdir(folder)
        snippet = card(rows, is_pair=is_pair, model=model).split("```python\n")[1].split("```")[0]
        exec(compile(snippet, "README.md", "exec"), {})
        assert "label" in capsys.readouterr().out
    assert ("text_pair" in snippet) == is_pair
