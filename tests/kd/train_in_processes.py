"""Trains a tiny student for some steps and saves it; started by a launcher with one or two processes."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed
from transformers import BertForSequenceClassification, BertTokenizerFast

from l2a.config import KDConfig
from l2a.data.encoding import encode
from l2a.kd.data import DistillationSet
from l2a.kd.losses import fit_subclasses
from l2a.kd.trainer import KDTrainer, fit_output_layer
from l2a.student.student import Student
from l2a.teacher.labelling import TeacherOutputs
from l2a.util.progress import process_count, process_rank
from tests.conftest import NEGATIVE, NEUTRAL, POSITIVE, make_examples, tiny_bert_config

CONFIG = KDConfig(warmup_steps=12, rounds=1, round_steps=1, batch_size=10, evaluate_every=4, embedding_rate=1.0)


def make_student(folder: Path, seed: int) -> Student:
    vocabulary = folder / f"vocab{process_rank()}.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *POSITIVE, *NEGATIVE, *NEUTRAL]))
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    torch.manual_seed(seed)  # no dropout: each process would draw its own
    config = tiny_bert_config(tokenizer, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return Student(BertForSequenceClassification(config), tokenizer)


def main(out: Path, processes: int, start: str, objective: str = "soft_labels") -> None:
    torch.set_num_threads(1)
    seed = process_rank() if start == "apart" else 0
    student, examples = make_student(out, seed), make_examples(50)
    signs = (examples.labels * 2 - 1).astype(np.float32)
    rng = np.random.default_rng(0)
    outputs = TeacherOutputs(np.stack([-signs, signs], 1), rng.normal(size=(50, 8)).astype("f4"))
    data = DistillationSet(encode(student.tokenizer, examples.inputs, 16), outputs, examples.labels)
    trainer = KDTrainer(student, CONFIG, make_examples(8, seed=3 + seed), 8, 16, seed)
    assert process_count() == processes, f"{process_count()} processes run, not {processes}"
    assert processes == 1 or distributed.get_world_size() == processes
    if start == "apart":
        fit_output_layer(student, data.take(rng.permutation(50)[: 20 + 10 * seed]))
    if objective != "soft_labels":
        weight = rng.normal(size=(2, 8))
        trainer.learn_subclasses(fit_subclasses(outputs, weight, objective, 2, np.random.default_rng(0)))
    trainer.train([data], [1.0], 12)
    trainer.restore_best()
    trainer.refit_output_layer(data.encoded)
    score = torch.tensor(trainer.best.log_likelihood, dtype=torch.float64)
    weights = {name: value.contiguous() for name, value in student.snapshot().items()}
    save_file(weights | {"score": score}, out / f"{process_rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
