from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from l2a.report.run_folder import export_student
from l2a.serving.classifier import Classifier
from l2a.student.student import class_names
from tests.conftest import tiny_bert_config

NAMES = ("positive", "negative", "mixed")
"""Not in their alphabetical order, as some cards have it."""


@pytest.fixture(scope="session")
def run_folder(tokenizer, tmp_path_factory) -> Path:
    """A run folder with nothing but its student, whose weights are random and large enough to tell texts apart."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    config = tiny_bert_config(tokenizer, initializer_range=0.3, **class_names(NAMES))
    export_student(BertForSequenceClassification(config).eval(), tokenizer, run / "student", "a card", 24)
    return run


@pytest.fixture(scope="session")
def student(run_folder) -> Path:
    return run_folder / "student"


@pytest.fixture(scope="session")
def classifier(student) -> Classifier:
    return Classifier.from_pretrained(student)
