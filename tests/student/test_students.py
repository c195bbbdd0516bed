import numpy as np
import pytest
import torch
from transformers import BertModel

from l2a.config import StudentConfig
from l2a.data.encoding import encode
from l2a.kd.trainer import run_student
from l2a.report.run_folder import check_parity, export_student
from l2a.student.student import build_student
from l2a.teacher.model import Teacher, load_encoder
from l2a.util.errors import UsageError
from tests.conftest import LABELS, make_examples, tiny_bert_config


def test_the_narrow_student_fits_its_share(teacher):
    student = build_student(StudentConfig(max_share=0.5), teacher, LABELS, (), seed=0)
    assert student.parameters_count <= 0.5 * teacher.parameters_count
    assert student.model.config.hidden_size < teacher.hidden_size


def test_its_embeddings_keep_the_teachers_geometry(teacher):
    student = build_student(StudentConfig(max_share=0.9), teacher, LABELS, (), seed=0)

    def distances(table: torch.Tensor) -> np.ndarray:
        return torch.pdist(table).numpy()

    ours, theirs = distances(student.word_embeddings()), distances(teacher.word_embeddings())
    assert np.corrcoef(ours, theirs)[0, 1] > 0.8


@pytest.fixture
def wider_teacher(tokenizer, tmp_path) -> Teacher:
    """A teacher that is larger than the classifier that tests give as a student."""
    BertModel(tiny_bert_config(tokenizer, hidden_size=128)).save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    return load_encoder(str(tmp_path / "large"), LABELS, seed=0)


def test_a_checkpoint_of_the_user_is_taken(classifier_folder, wider_teacher):
    student = build_student(
        StudentConfig(model=str(classifier_folder), max_share=1.0), wider_teacher, LABELS, (), seed=0
    )
    assert student.model.config.id2label == dict(enumerate(LABELS))


def test_a_student_larger_than_allowed_is_refused(classifier_folder, teacher):
    with pytest.raises(UsageError, match=r"at most 13\.3% is allowed"):
        build_student(StudentConfig(model=str(classifier_folder)), teacher, LABELS, (), seed=0)


def test_an_empty_folder_is_no_student(tmp_path, teacher):
    with pytest.raises(UsageError, match=r"student\.model .*: the folder has no config"):
        build_student(StudentConfig(model=str(tmp_path)), teacher, LABELS, (), seed=0)


def test_features_times_output_layer_are_the_logits(teacher):
    student = build_student(StudentConfig(max_share=0.9), teacher, LABELS, (), seed=0)
    logits, features = run_student(student, encode(student.tokenizer, make_examples(7).inputs, 24))
    weight, bias = student.output.weight.detach().numpy(), student.output.bias.detach().numpy()
    assert np.allclose(features @ weight.T + bias, logits, atol=1e-4)


def test_a_snapshot_restores_every_weight(teacher):
    student = build_student(StudentConfig(max_share=0.9), teacher, LABELS, (), seed=0)
    saved = student.snapshot()
    for parameter in student.model.parameters():
        parameter.data += 1
    student.restore(saved)
    assert all(torch.equal(saved[name], value) for name, value in student.snapshot().items())


def test_the_export_gives_the_same_logits(teacher, tmp_path):
    student = build_student(StudentConfig(max_share=0.9), teacher, LABELS, (), seed=0)
    export_student(student.model, student.tokenizer, tmp_path / "student", "# card", 24)
    texts = make_examples(9).inputs
    assert check_parity(student.model, student.tokenizer, tmp_path / "student", texts, 24) <= 1e-5
