import pytest
import torch
from transformers import BertForSequenceClassification

from l2a.evaluation.metrics import ClassificationMetrics, Interval
from l2a.report.run_folder import MethodReport
from tests.conftest import LABELS, tiny_bert_config


def make_row(name, accuracy, **changes):
    metrics = ClassificationMetrics(
        Interval(accuracy, accuracy - 0.05, accuracy + 0.05),
        Interval(accuracy - 0.01, accuracy - 0.06, accuracy + 0.04),
    )
    latency = {"batch_1": 1.234, "batch_1_spread": 0.1, "batch_32": 0.5, "batch_32_spread": 0.02}
    fields = {"name": name, "metrics": metrics, "parameters": 1234567, "latency_ms": latency}
    return MethodReport(**{**fields, **changes})


@pytest.fixture
def rows():
    return (make_row("tfidf_logreg", 0.7), make_row("plain_kd_student", 0.8), make_row("l2a_student", 0.75))


@pytest.fixture
def student(tokenizer):
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    config = tiny_bert_config(tokenizer, id2label=names, label2id={name: i for i, name in names.items()})
    return BertForSequenceClassification(config).train()
