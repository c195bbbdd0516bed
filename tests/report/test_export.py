import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ElectraConfig, ElectraForSequenceClassification, pipeline

from l2a.report.export import check_parity, export_student
from l2a.util.errors import RunError
from tests.conftest import LABELS, make_examples

TEXTS = make_examples(6).inputs


@pytest.fixture
def folder(student, tokenizer, tmp_path):
    export_student(student, tokenizer, tmp_path / "student", "# card\n", 32)
    return tmp_path / "student"


def test_folder_is_complete_and_holds_no_pickle(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert not {path.suffix for path in folder.iterdir()} & {".bin", ".pt", ".pkl", ".pth"}
    assert (folder / "README.md").read_text() == "# card\n"


@pytest.mark.parametrize("inputs", [TEXTS, make_examples(4, pairs=True).inputs], ids=["single", "pairs"])
def test_saved_model_gives_the_same_logits(student, tokenizer, folder, inputs):
    assert check_parity(student, tokenizer, folder, inputs, 32) <= 1e-6


def test_checking_keeps_training_mode(student, tokenizer, folder):
    check_parity(student, tokenizer, folder, TEXTS, 32)
    assert student.training
    student.eval()
    check_parity(student, tokenizer, folder, TEXTS, 32)
    assert not student.training


def test_pipeline_names_the_classes(student, tokenizer, folder):
    classify = pipeline("text-classification", model=str(folder))
    answer = classify(TEXTS[0][0], top_k=None)
    expected = student.eval()(**tokenizer(TEXTS[0][0], return_tensors="pt")).logits.softmax(-1)[0]
    scores = {each["label"]: each["score"] for each in answer}
    assert scores == {name: pytest.approx(expected[i].item(), abs=1e-5) for i, name in enumerate(LABELS)}


@pytest.mark.parametrize(
    "damage", [lambda weight: weight + 0.1, lambda weight: weight * torch.nan], ids=["moved", "nan"]
)
def test_damaged_weights_are_refused(student, tokenizer, folder, damage):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] = damage(weights["classifier.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="logits differ"):
        check_parity(student, tokenizer, folder, TEXTS, 32)


def test_swapped_class_names_are_refused(student, tokenizer, folder):
    student.config.id2label = {0: LABELS[1], 1: LABELS[0]}
    with pytest.raises(RunError, match="saved with the classes"):
        check_parity(student, tokenizer, folder, TEXTS, 32)


def test_an_architecture_with_narrow_embeddings_is_kept_whole(tokenizer, tmp_path):
    config = ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = ElectraForSequenceClassification(config)
    export_student(model, tokenizer, tmp_path / "electra", "", 32)
    assert check_parity(model, tokenizer, tmp_path / "electra", TEXTS, 32) <= 1e-6
