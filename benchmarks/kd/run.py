"""Benchmark of the KD trainer: `python benchmarks/kd/run.py [--smoke] [--output FILE]`."""

import argparse
import os
import platform
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cache import bytes_per_example, memory_growth
from contenders import L2A
from efficiency import COUNTED, arithmetic_dtype, label, top_operations
from material import DOMAIN, MAX_LENGTH, SEED, SMOKE, TEACHER, Material, Sizes, prepare
from speed import Clock, Timings, contenders, efficiencies, measure, speedups, throughput

from l2a.util.files import atomic_write_text, to_json

RESULT = Path(__file__).resolve().parents[1] / "results" / "kd.json"
PACKAGES = ("l2a", "torch", "transformers", "accelerate", "textbrewer", "numpy")
CLOCKS: tuple[Clock, ...] = ("wall", "cpu")
TARGETS = {
    "speedup_textbrewer_padded": 15.0,
    "speedup_textbrewer_dynamic": 3.0,
    "speedup_trainer_cached": 2.0,
    "student_step_efficiency": 0.5,
    "labelling_efficiency": 0.6,
}


def main() -> None:
    """Run everything and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    started = time.perf_counter()
    material = prepare(SMOKE if arguments.smoke else Sizes())
    result = benchmark(material) | {"seconds": time.perf_counter() - started}
    atomic_write_text(arguments.output, to_json(result, indent=1) + "\n")
    for name, target in TARGETS.items():
        print(f"{name}: {result[name]:.3g} (target {target:g})")


def benchmark(material: Material) -> dict[str, Any]:
    """Measure all of it.

    Args:
        material: Texts, teacher and sizes.

    Returns:
        The content of the result file.
    """
    warm_up(material)
    all_of_them = contenders(material)
    timings, trained = measure(material, all_of_them), all_of_them["l2a"]
    assert isinstance(trained, L2A)
    rates = {clock: throughput(material, all_of_them, timings, clock) for clock in CLOCKS}
    measured = {clock: speedups(rates[clock]) | efficiencies(material, trained, timings, clock) for clock in CLOCKS}
    return {
        **measured["wall"],
        "by_processor_time": measured["cpu"],
        "targets": {name: {"at_least": goal, "met": measured["wall"][name] >= goal} for name, goal in TARGETS.items()},
        "accuracy": accuracies(material, timings),
        **costs_of_cache(material),
        "examples_a_second": rates,
        **raw(material, timings),
        "counted": COUNTED,
        "profile": profiles(material),
        "setting": setting(material),
    }


def accuracies(material: Material, timings: Timings) -> dict[str, float]:
    """Accuracy on the held-out split of all students, of the one that none has trained yet, and of the teacher."""
    start = material.accuracy(material.new_student())
    return timings.accuracy | {"start": start, "teacher": material.teacher_accuracy()}


def profiles(material: Material) -> dict[str, Any]:
    """Operations that take the processor's time in one epoch of training, and in labelling."""
    epoch = L2A(replace(material, sizes=replace(material.sizes, repeats=1)))
    return {"student_step": top_operations(epoch.training()), "labelling": top_operations(lambda: label(material))}


def warm_up(material: Material) -> None:
    """Let every contender train a little, so that none pays for imports and first calls."""
    sizes = Sizes(texts=2 * material.sizes.batch_size, repeats=1)
    little = Material(
        sizes, material.teacher, material.texts.take(range(sizes.texts)), material.validation, material.held_out
    )
    for contender in contenders(little).values():
        contender.train()
    label(little)


def costs_of_cache(material: Material) -> dict[str, Any]:
    """Measure the cache of teacher outputs."""
    stored, sizes = bytes_per_example(), material.sizes
    with tempfile.TemporaryDirectory() as folder:
        student = material.new_student()
        student.model.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        growth = memory_growth(Path(folder), sizes.memory_texts, sizes.memory_steps)
    return {"cache_bytes_per_example": stored["per_class"], "cache_bytes": stored, "memory_growth": growth}


def raw(material: Material, timings: Timings) -> dict[str, Any]:
    """What the ratios were computed from."""
    products = {"student": timings.student_product, "labelling": timings.labelling_product}
    return {
        "seconds_of_pieces": {name: list(map(asdict, pieces)) for name, pieces in timings.pieces.items()},
        "labelling": {
            "texts": len(material.texts),
            "epochs": material.sizes.repeats,
            "seconds": list(map(asdict, timings.labelling)),
            "dtype": str(arithmetic_dtype()).removeprefix("torch."),
        },
        "seconds_of_matrix_products": {name: list(map(asdict, each)) for name, each in products.items()},
    }


def setting(material: Material) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "domain": DOMAIN,
        "teacher": TEACHER,
        "student_parameters": material.new_student().parameters_count,
        "max_length": MAX_LENGTH,
        "seed": SEED,
        "updates": material.sizes.updates,
        "sizes": asdict(material.sizes),
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
