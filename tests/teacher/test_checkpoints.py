"""Any encoder is a teacher; a checkpoint that is none is refused in one sentence before anything is trained."""

import io
import itertools
import json
import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from l2a.config import StudentConfig, TeacherConfig
from l2a.data.encoding import encode
from l2a.report.run_folder import check_parity, export_student
from l2a.student.student import build_student, check_student, load_checkpoint
from l2a.teacher.finetune import fine_tune
from l2a.teacher.labelling import predict, token_vectors
from l2a.teacher.model import check_teacher, load_encoder, load_fine_tuned
from l2a.util import UsageError
from tests.conftest import ARCHITECTURES, LABELS, make_examples, plain_tokenizer, save_tiny, tiny_bert_config

PAIRS = make_examples(8, pairs=True)
STUDENT = StudentConfig(max_share=0.9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_encoder_is_a_teacher_whose_student_of_pairs_scores_alike_when_exported(kind, tokenizer, tmp_path):
    folder = save_tiny(kind, tmp_path / kind, plain_tokenizer(tokenizer))
    teacher = load_encoder(str(folder), LABELS, seed=0)
    fine_tune(teacher, PAIRS, TeacherConfig(frozen_layers=1), 1, 64, 0, "train")
    longest = [("good film " * 60, "bad " * 60)]
    alone = predict(teacher, [*PAIRS.inputs[:1]], 64).logits
    assert np.allclose(predict(teacher, [*PAIRS.inputs, *longest], 64).logits[:1], alone, atol=2e-2)
    assert token_vectors(teacher).shape == (len(tokenizer), 64)
    student = build_student(STUDENT, teacher, LABELS, PAIRS.inputs, 0)
    export_student(student.model, student.tokenizer, tmp_path / "student", "", 48)
    assert check_parity(student.model, student.tokenizer, tmp_path / "student", PAIRS.inputs, 48) < 1e-4


@pytest.mark.parametrize(("kind", "positions"), [("bert", 66), ("mpnet", 64), ("roberta", 65), ("modernbert", 66)])
def test_all_positions_that_a_model_has_can_be_used_and_no_more(kind, positions, tokenizer, tmp_path):
    save_tiny(kind, tmp_path, plain_tokenizer(tokenizer))
    teacher = check_teacher(TeacherConfig(str(tmp_path)), LABELS, 64)
    assert teacher.positions == positions
    batch = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(1, positions, dtype=torch.long))
    assert load_encoder(str(tmp_path), LABELS, 0)(batch)[0].shape == (1, 2)
    with pytest.raises(UsageError, match=rf"max_length is 65, but .* at most {positions} tokens; give --max-length 64"):
        check_teacher(TeacherConfig(str(tmp_path)), LABELS, 65)


def cut(folder, name, size):
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def change(folder, name, **content):
    known = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({k: v for k, v in (known | content).items() if v is not None}))


def add_tokens(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["January", "March"])
    tokenizer.save_pretrained(folder)


FAULTS = {
    "the folder has no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "the folder has no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "the folder has no config": lambda folder: (folder / "config.json").unlink(),
    r"model\.safetensors cannot be read": lambda folder: cut(folder, "model.safetensors", -9),
    r"model\.safetensors cannot be read \(": lambda folder: (folder / "model.safetensors").write_bytes(b"junk" * 99),
    "its config cannot be read": lambda folder: cut(folder, "config.json", 30),
    "its config cannot be read ": lambda folder: change(folder, "config.json", model_type=None),
    "its tokenizer cannot be read": lambda folder: cut(folder, "tokenizer.json", 30),
    "its tokenizer has no padding token": lambda folder: change(folder, "tokenizer_config.json", pad_token=None),
    "numbers tokens up to 80, but the model has embeddings for 79": add_tokens,
    "a gpt2 model is not an encoder": lambda folder: AutoConfig.for_model("gpt2").save_pretrained(folder),
    "a bart model is not an encoder": lambda folder: AutoConfig.for_model("bart").save_pretrained(folder),
}


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    return save_tiny("bert", tmp_path_factory.mktemp("whole"), plain_tokenizer(tokenizer))


@pytest.mark.parametrize(("fault", "field"), zip(FAULTS, itertools.cycle(["teacher", "student"])))
def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_sentence(fault, field, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    FAULTS[fault](folder)
    with pytest.raises(UsageError, match=rf"^{field}\.model '{folder}': .*{fault}") as caught:
        if field == "teacher":
            check_teacher(TeacherConfig(str(folder)), LABELS, 16)
        else:
            load_checkpoint(str(folder), LABELS, weights=False)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_belong_to_the_config_are_refused(whole, tmp_path):
    for number, changes in enumerate(({"num_hidden_layers": 3}, {"intermediate_size": 48})):
        folder = shutil.copytree(whole, tmp_path / str(number))
        change(folder, "config.json", **changes)
        for load in (partial(load_encoder, seed=0), load_checkpoint):
            with pytest.raises(UsageError, match=r"model .*: its weights"):
                load(str(folder), LABELS)


def test_a_model_without_its_head_is_no_fine_tuned_teacher(tokenizer, tmp_path):
    save_tiny("bert", tmp_path, tokenizer, id2label=dict(enumerate(LABELS)))
    with pytest.raises(UsageError, match="its weights lack classifier"):
        load_fine_tuned(str(tmp_path), LABELS)


PLANTED = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import BertConfig, BertModel, BertTokenizerFast
class Planted(BertConfig):
    model_type = "planted"
class PlantedModel(BertModel):
    config_class = Planted
"""


@pytest.mark.parametrize("model_type", ["planted", "bert"])
def test_code_in_a_models_folder_never_runs_whatever_is_answered(model_type, tokenizer, tmp_path, monkeypatch):
    marker, folder = tmp_path / "marker", save_tiny("bert", tmp_path / "model", plain_tokenizer(tokenizer))
    (folder / "planted.py").write_text(PLANTED.format(marker=str(marker)))
    names = {"AutoConfig": "planted.Planted", "AutoModel": "planted.PlantedModel"}
    names["AutoModelForSequenceClassification"] = names["AutoModel"]
    change(folder, "config.json", model_type=model_type, auto_map=names)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "planted.BertTokenizerFast"]})
    refusal = pytest.raises(UsageError, match="needs its own code, which l2a never runs")
    for load in (partial(load_encoder, seed=0), load_checkpoint):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        # transformers has the architecture of BERT, so that the folder's code is not needed
        with nullcontext() if model_type == "bert" else refusal:
            load(str(folder), LABELS)
    assert not marker.exists()


def test_checks_read_no_weights_and_count_as_the_loaded_models_do(encoder_folder, classifier_folder, monkeypatch):
    real = load_encoder(str(encoder_folder), LABELS, 0)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    teacher = check_teacher(TeacherConfig(str(encoder_folder)), LABELS, 32)
    assert teacher.parameters_count == real.parameters_count
    check_student(STUDENT, teacher, LABELS, PAIRS.inputs, 32)
    with pytest.raises(UsageError, match=r"raise student\.max_share"):
        check_student(StudentConfig(max_share=0.1), teacher, LABELS, PAIRS.inputs, 32)
    fine_tuned = TeacherConfig(str(classifier_folder), fine_tuned=True)
    assert check_teacher(fine_tuned, LABELS, 32).parameters_count > 0
    with pytest.raises(UsageError, match="its labels are positive, negative"):
        check_teacher(fine_tuned, ("good", "bad"), 32)


def test_wrong_students_are_refused_before_any_training(encoder_folder, classifier_folder, tokenizer, tmp_path):
    teacher = check_teacher(TeacherConfig(str(encoder_folder)), LABELS, 32)

    def check(max_length=32, **settings):
        check_student(StudentConfig(**settings), teacher, LABELS, PAIRS.inputs, max_length)

    with pytest.raises(UsageError, match=r"student\.model './no-such-student': no such folder"):
        check(model="./no-such-student")
    with pytest.raises(UsageError, match=r"parameters are 10.*% of the teacher's .*, but at most 60\.0% is allowed"):
        check(model=str(classifier_folder), max_share=0.6)
    short = save_tiny("bert", tmp_path / "short", tokenizer, hidden_size=8, max_position_embeddings=20)
    with pytest.raises(UsageError, match=r"the student reads at most 20 tokens; give --max-length 20"):
        check(model=str(short), max_share=1.0)
    words = Tokenizer(models.WordLevel(tokenizer.get_vocab(), unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = save_tiny("roberta", tmp_path / "other", PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]"))
    teacher = check_teacher(TeacherConfig(str(other)), LABELS, 32)
    with pytest.raises(UsageError, match="the generator needs a WordPiece vocabulary, and this one is WordLevel"):
        check(max_share=0.9)


def test_a_classifier_without_a_pooler_keeps_its_body(tokenizer, tmp_path):
    BertModel(tiny_bert_config(tokenizer), add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student, body = load_checkpoint(str(tmp_path), LABELS), AutoModel.from_pretrained(tmp_path)
    batch = encode(student.tokenizer, PAIRS.inputs, 32).padded(np.arange(2))
    ours = student.model.bert.eval()(**batch).last_hidden_state
    assert torch.allclose(ours, body.eval()(**batch).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"attn_implementation": "stranger/kernel"}, {"_attn_implementation": "stranger/kernel"},
     {"transformers_weights": "../other.safetensors"}, {"auto_map": {"AutoModel": "stranger/model--code.Model"}}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_config_cannot_name_code_or_weights_of_others(changes, encoder_folder, tmp_path, monkeypatch):
    """With the package kernels, transformers fetches and runs the kernel that a config names."""
    folder = shutil.copytree(encoder_folder, tmp_path / "model")
    change(folder, "config.json", **changes)
    monkeypatch.setattr("transformers.modeling_utils.is_kernel", lambda name: "/" in (name or "") and 1 / 0)
    loaded, plain = (load_encoder(str(place), LABELS, seed=0) for place in (folder, encoder_folder))
    assert loaded.encoder.config._attn_implementation == plain.encoder.config._attn_implementation
    assert torch.equal(loaded.word_embeddings(), plain.word_embeddings())
