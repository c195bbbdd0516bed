"""Times the contenders in turn, so that each ratio comes from one run on one machine."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from contenders import L2A, Contender, HuggingFace, TextBrewer
from efficiency import arithmetic_dtype, forward_cost, label, labelling_shapes, matmul_seconds, products_alone
from material import Material
from timing import Seconds

Clock = Literal["wall", "cpu"]
TOKENS = 1024
"""In a typical batch: 32 texts of 32 tokens."""


@dataclass
class Timings:
    """What the repeats gave, one entry each.

    Attributes:
        pieces: Of each contender's piece.
        accuracy: Of each contender at the end of a whole training.
        labelling: Of labelling all texts once.
        student_product: One square matrix product in the number format of both models, just before l2a trains.
        labelling_product: The same just before the teacher labels.
        student_products: The products of the student's linear layers on a batch of typical size, nothing else.
    """

    pieces: dict[str, list[Seconds]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    labelling: list[Seconds] = field(default_factory=list)
    student_product: list[Seconds] = field(default_factory=list)
    labelling_product: list[Seconds] = field(default_factory=list)
    student_products: list[Seconds] = field(default_factory=list)


def contenders(material: Material) -> dict[str, Contender]:
    """Build all contenders."""
    return {
        "l2a": L2A(material),
        "trainer_cached": HuggingFace(material),
        "textbrewer_dynamic": TextBrewer(material, padded=False),
        "textbrewer_padded": TextBrewer(material, padded=True),
    }


def measure(material: Material, all_of_them: Mapping[str, Contender]) -> Timings:
    """Time labelling and every contender, in turn, as often as asked."""
    timings, size = Timings({name: [] for name in all_of_them}), material.sizes.matmul
    for repeat in range(material.sizes.repeats):
        timings.labelling_product.append(matmul_seconds(size, arithmetic_dtype()))
        timings.labelling.append(label(material))
        timings.student_products.append(products_alone(material.new_student().model, TOKENS, arithmetic_dtype())[1])
        timings.student_product.append(matmul_seconds(size, arithmetic_dtype()))
        for name, contender in all_of_them.items():
            timings.pieces[name].append(contender.train())
            print(f"{repeat + 1}: {name}, {contender.updates} updates: {timings.pieces[name][-1]}", flush=True)
    timings.accuracy.update({name: material.accuracy(contender.student) for name, contender in all_of_them.items()})
    return timings


def throughput(
    material: Material, all_of_them: Mapping[str, Contender], timings: Timings, clock: Clock
) -> dict[str, float]:
    """Examples a second of every contender, and of those that need labels first with labelling included."""
    updates, rates = material.sizes.updates, dict[str, float]()
    examples, labelling = material.sizes.batch_size * updates, _median(timings.labelling, clock)
    for name, contender in all_of_them.items():
        seconds = _median(timings.pieces[name], clock) * updates / contender.updates
        rates[name] = examples / seconds
        if not isinstance(contender, TextBrewer):
            rates[f"{name}_with_labelling"] = examples / (seconds + labelling)
    return rates


def speedups(rates: Mapping[str, float]) -> dict[str, float]:
    """l2a over each peer; with labelling included, over those that keep the teacher in the loop."""
    peers = ("textbrewer_padded", "textbrewer_dynamic", "trainer_cached")
    ratios = {f"speedup_{peer}": rates["l2a"] / rates[peer] for peer in peers}
    return ratios | {f"speedup_{peer}_with_labelling": rates["l2a_with_labelling"] / rates[peer] for peer in peers[:2]}


def efficiencies(material: Material, trained: L2A, timings: Timings, clock: Clock) -> dict[str, float]:
    """Counted multiply-adds a second over those of a square matrix product, median of the repeats."""
    student, teacher, product = trained.student, material.teacher, material.sizes.matmul**3
    step = 3 * forward_cost(student.model, student.model.config, student).of(trained.shapes)
    labelled = forward_cost(teacher, teacher.encoder.config, teacher).of(labelling_shapes(material))
    parts = {
        "student_step_efficiency": (step, timings.pieces["l2a"], timings.student_product),
        "labelling_efficiency": (labelled, timings.labelling, timings.labelling_product),
        "student_products_efficiency": (
            products_alone(student.model, TOKENS, arithmetic_dtype())[0],
            timings.student_products,
            timings.student_product,
        ),
    }
    return {
        name: statistics.median(
            count / getattr(spent, clock) / (product / getattr(rate, clock))
            for spent, rate in zip(durations, products, strict=True)
        )
        for name, (count, durations, products) in parts.items()
    }


def _median(durations: Sequence[Seconds], clock: Clock) -> float:
    return statistics.median(getattr(duration, clock) for duration in durations)
