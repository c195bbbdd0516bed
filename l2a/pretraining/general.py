"""The general stage from text to a finished model folder."""

from pathlib import Path
from typing import Any

import torch
import transformers

import l2a
from l2a.errors import UsageError
from l2a.files import atomic_folder
from l2a.precision import best_device
from l2a.pretraining.checkpoint import FOLDER
from l2a.pretraining.config import PretrainConfig
from l2a.pretraining.corpus import Corpus, read_corpus
from l2a.pretraining.export import save_student, write_card
from l2a.pretraining.initialisation import (
    average_word_states,
    build_student,
    fit_projections,
    isolated_word_states,
)
from l2a.pretraining.model import GeneralStudent
from l2a.pretraining.targets import TeacherTargets, label_texts
from l2a.pretraining.trainer import train
from l2a.progress import SILENT, Progress
from l2a.students.word_vectors import principal_word_vectors
from l2a.teacher.load import load_encoder
from l2a.teacher.model import Teacher


def pretrain(config: PretrainConfig, progress: Progress = SILENT) -> Path:
    """Distil a general student and write it; an interrupted run with the same settings continues exactly.

    Args:
        config: Settings of the run.
        progress: Shows the stages.

    Returns:
        The model's folder, ``config.output_dir``.

    Raises:
        RunError: If the run fails: a full disk, no network, a loss that is not finite.
        UsageError: If a text, a domain or the output folder cannot be used.
    """
    _check_output(config.output_dir)
    device = best_device()
    corpus = read_corpus(config, progress)
    teacher = load_encoder(config.teacher, ("0", "1"), seed=0, progress=progress)
    targets = label_texts(teacher, corpus, config, device, progress)
    model = start_student(teacher, targets, config).to(device)
    train(model, targets, config, config.output_dir / FOLDER, progress)
    with atomic_folder(config.output_dir) as folder:
        save_student(model, teacher.tokenizer, folder)
        write_card(folder, config, _facts(teacher, model, targets, corpus))
    return config.output_dir


def start_student(teacher: Teacher, targets: TeacherTargets, config: PretrainConfig) -> GeneralStudent:
    """Build the student in the state that training starts from.

    Args:
        teacher: The pretrained teacher.
        targets: The labelled corpus.
        config: Size and seed.

    Returns:
        The student, with its projections fitted.

    Raises:
        UsageError: If the student's word vectors are wider than the teacher.
    """
    states = average_word_states(targets, isolated_word_states(teacher.encoder, teacher.tokenizer))
    vectors = principal_word_vectors(states, config.student.embedding_size)
    student = build_student(vectors, int(teacher.tokenizer.pad_token_id), config.student, config.seed)
    model = GeneralStudent(student, teacher.hidden_size, config.seed)
    fit_projections(model, targets, config.seed)
    return model


def _check_output(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # What a killed run has left of a checkpoint begins with a dot.
    present = sorted(name for name in names if name != FOLDER and not name.startswith(f".{FOLDER}."))
    if present:
        raise UsageError(
            f"output_dir: {folder} already holds {', '.join(present[:3])}; give a new folder, or remove this one"
        )


def _facts(teacher: Teacher, model: GeneralStudent, targets: TeacherTargets, corpus: Corpus) -> dict[str, Any]:
    body = sum(parameter.numel() for parameter in model.classifier.parameters())
    return {
        "parameters (with a head of 2 classes)": body,
        "share of the teacher": f"{body / teacher.parameters_count:.1%}",
        "texts": len(corpus.texts),
        "variants": len(corpus.variants),
        "tokens": int(targets.encoded.offsets[-1]),
        **{f"sha256 of {name}": digest for name, digest in corpus.files.items()},
        "versions": f"l2a {l2a.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
