"""What a finished student costs in use: ``python benchmarks/export.py --run RUN``.

It writes benchmarks/results/export.json. The run's student is exported and compared on a labelled domain with itself in
PyTorch, beside a teacher of base size, whose weights are random as they do not change its speed. ``l2a predict`` then
classifies files of two sizes with the int8 model, and two shorter ones where another student reads the long one. Times
are CPU time on one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import MPNetConfig, MPNetForSequenceClassification

from l2a.data.examples import TextInput
from l2a.evaluation.metrics import measure_latency
from l2a.report.run_folder import versions
from l2a.serving import classifier
from l2a.serving.classifier import Classifier, labelled_texts, run
from l2a.serving.export import export_onnx
from l2a.util.files import atomic_write_text, to_json

RESULT = Path(__file__).parent / "results" / "export.json"
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime)
"""


def teacher_latency(student: Classifier, inputs: list[TextInput]) -> dict[str, float]:
    """Measure an encoder of base size (MPNet's 12 layers of 768) on the student's own tokens."""
    engine = student.engine
    with torch.device("cpu"):
        model = MPNetForSequenceClassification(MPNetConfig(vocab_size=engine.tokenizer.get_vocab_size())).eval()
    read, answer = ["input_ids", "attention_mask"], partial(classifier.run_torch, model)
    teacher = engine._replace(model=model, read=read, names=("a", "b"), run=answer)
    return dict(measure_latency(lambda texts: run(teacher, texts).argmax(axis=1), inputs[:64], model, seconds=6))


def predict_cost(student: Path, inputs: list[TextInput], lines: int, folder: Path) -> dict[str, float]:
    """Run ``l2a predict`` on a file of some lines; give its peak memory in MB and its CPU seconds."""
    source = folder / f"{lines}.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number, text in enumerate(islice(cycle(inputs), lines)):
            file.write(json.dumps({"id": number, **dict(zip(("text", "text_pair"), text, strict=False))}) + "\n")
    command = [str(student), str(source), "--output", str(folder / "out.jsonl"), "--overwrite", "--quiet"]
    # A process's peak includes what the one that starts it holds, which is little in between.
    measured = [sys.executable, "-c", MEASURE, sys.executable, "-m", "l2a", "predict", *command]
    peak, cpu = map(float, subprocess.run(measured, check=True, capture_output=True, text=True).stdout.split())
    return {"lines": lines, "peak_mb": peak * 1024 / 1e6, "cpu_seconds": cpu}


def seconds_a_line(few: dict[str, float], many: dict[str, float]) -> float:
    """Give the CPU seconds of a line, the start of the command left out."""
    return (many["cpu_seconds"] - few["cpu_seconds"]) / (many["lines"] - few["lines"])


def own_seconds(student: Classifier, inputs: list[TextInput], count: int) -> float:
    """Measure the CPU seconds that the model itself takes for a text, tokenisation and everything else left out."""
    spent, engine = 0.0, student.engine

    def timed(batch: Any) -> Any:
        nonlocal spent
        started = time.process_time()
        logits = engine.run(batch)
        spent += time.process_time() - started
        return logits

    run(engine._replace(run=timed), list(islice(cycle(inputs), count)))
    return spent / count


def parameters(run: Path) -> int:
    """Read how many parameters the student of a run has."""
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    return int(next(row["parameters"] for row in metrics["rows"] if row["name"] == metrics["student"]))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/latest", help="a finished run")
    parser.add_argument("--predict", help="a run whose student classifies the two files, such as a small one")
    parser.add_argument("--domain", default="tweets", help="labelled texts that the run did not train on")
    parser.add_argument("--lines", type=int, nargs=2, default=(10_000, 1_000_000), help="sizes of the two files")
    parser.add_argument(
        "--own-lines", type=int, nargs=2, default=(2_000, 40_000), help="those for the run's own student"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    inputs, labels = labelled_texts(given.domain, run=Path(given.run))
    report, student = export_onnx(given.run, inputs, labels, static=True), Classifier.from_pretrained(given.run)
    served = Path(given.run) / "onnx" / "model_int8.onnx"
    original, _, int8, static = report["models"]
    reader = served
    if given.predict:
        export_onnx(given.predict, inputs, labels)
        reader = Path(given.predict) / "onnx" / "model_int8.onnx"
    teacher = teacher_latency(student, inputs)
    with tempfile.TemporaryDirectory() as folder:
        few, many = (predict_cost(reader, inputs, lines, Path(folder)) for lines in given.lines)
        start, whole = (predict_cost(served, inputs, lines, Path(folder)) for lines in given.own_lines)
    own, of_student = (own_seconds(Classifier(path, 1), inputs, 2048) for path in (reader, served))
    content = {
        "int8_accuracy_drop": original["accuracy"] - int8["accuracy"],
        "speedup_teacher_batch_1": teacher["batch_1"] / int8["latency_ms"]["batch_1"],
        "size_ratio": int8["bytes"] / original["bytes"],
        "memory_growth": many["peak_mb"] / few["peak_mb"],
        "throughput_share": of_student / seconds_a_line(start, whole),
        "throughput_share_predict": own / seconds_a_line(few, many),
        "texts_per_second": {"predict": 1 / seconds_a_line(few, many), "model": 1 / own, "student": 1 / of_student},
        "parameters": {"predict": parameters(reader.parents[1]), "student": parameters(Path(given.run))},
        "predict": [few, many], "own_predict": [start, whole],
        "teacher_latency_ms": teacher, "static": static, "export": report,
        "domain": given.domain, "versions": versions(),
    }  # fmt: skip
    atomic_write_text(given.output, to_json(content, indent=1) + "\n")
    print(to_json({name: content[name] for name in list(content)[:7]}, indent=1))


if __name__ == "__main__":
    main()
