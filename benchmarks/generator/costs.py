"""What AugPro-FGSM costs compared with a training step, and what share of a run the generator takes."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from l2a.config import KDConfig, StudentConfig, load_config, override
from l2a.data.domains import load_domain
from l2a.data.encoding import encode
from l2a.generator.operators import build_operator
from l2a.generator.tokens import TokenSpace, build_neighbour_table, vocabulary
from l2a.kd.data import DistillationSet
from l2a.kd.trainer import KDTrainer, embedding_gradients
from l2a.pipeline.distill import distill
from l2a.student.student import build_student
from l2a.teacher.labelling import predict
from l2a.teacher.model import load_encoder

LENGTH, BATCH = 128, 32


def measure_fgsm_cost(seed: int, smoke: bool) -> dict[str, Any]:
    """Time AugPro-FGSM and a distillation step on the same batch of the shipped domain "movies", of median lengths.

    Args:
        seed: Of student and draws.
        smoke: Fewer repetitions.

    Returns:
        The ratio and both times; the teacher has labelled the batch before, as in a run.
    """
    data = load_domain("movies").train
    teacher = load_encoder("minilm-l6", data.label_names, seed)
    student = build_student(StudentConfig(), teacher, data.label_names, data.inputs, seed)
    # Texts of like length, as both read them in a run: training sorts its batches, the gradients sort the whole pool.
    by_length = np.argsort(encode(teacher.tokenizer, data.inputs, LENGTH).lengths, kind="stable")
    batch = data.take(by_length[(len(data) - BATCH) // 2 :][:BATCH])
    outputs = predict(teacher, batch.inputs, LENGTH)
    names, words = vocabulary(student.tokenizer), student.word_embeddings().cpu()[: len(student.tokenizer)]
    space = TokenSpace(
        student.tokenizer, build_neighbour_table(words, names), words,
        lambda inputs: embedding_gradients(student, lambda _: outputs, inputs, LENGTH), LENGTH,
    )  # fmt: skip
    operator, rng = build_operator("augpro_fgsm", lambda: space, lambda: None), np.random.default_rng(seed)
    kd = dataclasses.replace(KDConfig(), evaluate_every=10**6)
    trainer = KDTrainer(student, kd, data.take(np.arange(2)), teacher.hidden_size, LENGTH, seed)
    learned = DistillationSet(encode(student.tokenizer, batch.inputs, LENGTH), outputs, batch.labels)
    steps, rounds = (2, 1) if smoke else (10, 5)
    augmenting = _best(lambda: operator(batch.inputs, batch.inputs, 0.15, rng), steps, rounds)
    training = _best(lambda: trainer.train([learned], [1.0], steps), 1, rounds) / steps
    facts = {"augmenting_seconds": augmenting, "training_step_seconds": training, "batch": BATCH}
    return {"fgsm_cost_ratio": {"value": augmenting / training, "target": 1.5, **facts}}


def _best(work: Callable[[], object], repetitions: int, rounds: int) -> float:
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(repetitions):
            work()
        seconds.append((time.perf_counter() - started) / repetitions)
    return min(seconds)


def measure_generator_share(run: Path | None, folder: Path, preset: str) -> dict[str, Any]:
    """Read how long the generator took in a finished run, teacher labelling aside.

    Args:
        run: Output folder of ``l2a distill``; None makes a run.
        folder: Where that goes.
        preset: Its budget.

    Returns:
        The share and what it is made of.
    """
    if run is None:
        run = folder / "run"
        distill(override(load_config(preset), {"output_dir": str(run), "compare": False}))
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    stages = metrics["seconds_by_stage"]
    drawing = stages["draw candidates"]
    labelling = sum(done["generator"]["labelling_seconds"] for done in metrics["rounds"])
    whole = sum(stages.values())
    facts = {"drawing_seconds": drawing, "labelling_seconds": labelling, "run_seconds": whole}
    share = (drawing - labelling) / whole
    return {"generator_share": {"value": share, "target": 0.05, **facts, "seconds_by_stage": stages}}
