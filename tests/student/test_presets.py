import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from l2a.config import StudentConfig
from l2a.data.encoding import encode
from l2a.kd.trainer import embedding_gradients, run_student
from l2a.report.run_folder import export_student
from l2a.student.student import build_student
from l2a.teacher.labelling import predict
from l2a.util.errors import UsageError
from tests.conftest import LABELS, make_examples
from tests.student.conftest import PRESETS, make_student

LOADING = """
import json, sys, torch
sys.modules["l2a"] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = []
for folder in sys.argv[2:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found.append([])
    for sides in json.loads(sys.argv[1]):
        inputs = tokenizer(*sides, padding=True, return_tensors="pt")
        with torch.inference_mode():
            found[-1].append(model(**inputs).logits.tolist())
print(json.dumps(found))
"""


@pytest.mark.parametrize(("preset", "share"), [("narrow", 0.133), ("narrow", 0.6), ("bert-tiny", 0.95)])
def test_every_preset_fills_its_share_without_exceeding_it(preset, share, large_teacher, domain_texts):
    student = build_student(StudentConfig(preset, max_share=share), large_teacher, LABELS, domain_texts, seed=0)
    actual = student.parameters_count / large_teacher.parameters_count
    assert 0.7 * min(share, 0.3) < actual <= share
    assert student.model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_share_too_small_is_refused_with_one_that_holds(preset, large_teacher, domain_texts):
    config = StudentConfig(preset, max_share=0.004)
    with pytest.raises(UsageError, match=rf"student\.max_share: 0\.004 .* '{preset}' needs at least") as caught:
        build_student(config, large_teacher, LABELS, domain_texts, seed=0)
    share = float(re.search(r"raise student\.max_share to ([\d.]+),", str(caught.value))[1])
    build_student(dataclasses.replace(config, max_share=share), large_teacher, LABELS, domain_texts, seed=0)


@pytest.mark.slow
def test_every_preset_gives_the_same_logits_in_a_process_without_this_package(large_teacher, domain_texts, tmp_path):
    first, second = [text for (text,) in domain_texts[:5]], [text for (text,) in domain_texts[5:10]]
    students = [make_student(preset, large_teacher, domain_texts) for preset in PRESETS]
    for preset, student in zip(PRESETS, students, strict=True):
        export_student(student.model, student.tokenizer, tmp_path / preset, "# card", 64)
    done = subprocess.run(
        [sys.executable, "-c", LOADING, json.dumps([[first], [first, second]]), *(str(tmp_path / p) for p in PRESETS)],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for preset, student, found in zip(PRESETS, students, json.loads(done.stdout.splitlines()[-1]), strict=True):
        for inputs, logits in zip((zip(first, strict=True), zip(first, second, strict=True)), found, strict=True):
            expected = run_student(student, encode(student.tokenizer, list(inputs), 64))[0]
            assert np.allclose(expected, logits, atol=1e-4), preset


@pytest.mark.parametrize("preset", PRESETS)
def test_one_seed_gives_one_student_and_another_seed_another(preset, large_teacher, domain_texts):
    first, again, other = (make_student(preset, large_teacher, domain_texts, seed).snapshot() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_gradients_at_its_word_embeddings(preset, large_teacher, domain_texts):
    student = make_student(preset, large_teacher, domain_texts)
    inputs = domain_texts[:6]

    def label(texts):
        return predict(large_teacher, texts, 32)

    gradients = embedding_gradients(student, label, inputs, 32)
    lengths = encode(student.tokenizer, inputs, 32).lengths
    assert [gradient.shape for gradient in gradients] == [(n, student.word_embeddings().shape[1]) for n in lengths]
    assert all(np.abs(gradient).sum(axis=1).min() > 0 for gradient in gradients)


def readable_part_of_a_bag_of_words(student, texts):
    """Read the mean word vector of unseen texts off an untrained student's features by ridge regression: its R^2."""
    encoded, vectors = encode(student.tokenizer, texts, 32), student.word_embeddings().numpy()
    starts, ends = encoded.offsets[:-1], encoded.offsets[1:]
    bags = np.stack([vectors[encoded.ids[start:end]].mean(0) for start, end in zip(starts, ends, strict=True)])
    bags /= bags.std()
    features, half = run_student(student, encoded)[1], len(texts) // 2
    reader = Ridge(alpha=0.01).fit(features[:half], bags[:half])
    return reader.score(features[half:], bags[half:])


def test_a_fresh_student_starts_as_a_bag_of_words(large_teacher, domain_texts):
    student = make_student("narrow", large_teacher, domain_texts)
    assert readable_part_of_a_bag_of_words(student, domain_texts) > 0.75


def test_a_checkpoint_of_the_user_is_taken(classifier_folder, large_teacher):
    student = build_student(StudentConfig(model=str(classifier_folder)), large_teacher, LABELS, (), seed=0)
    assert student.model.config.id2label == dict(enumerate(LABELS))


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
