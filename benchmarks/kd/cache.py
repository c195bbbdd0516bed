"""What cached teacher outputs cost: bytes on disk, and memory while a student is trained on many texts."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from l2a.config import KDConfig
from l2a.data.encoding import EncodedTexts, encode
from l2a.data.examples import Examples, TextInput
from l2a.kd.data import DistillationSet
from l2a.kd.trainer import KDTrainer
from l2a.student.student import Student, load_checkpoint
from l2a.teacher.labelling import OutputStore, TeacherOutputs, content_key

LABELS = ("negative", "positive")
WIDTH = 384
MAX_LENGTH = 128
SEED = 0
STARTS = ("texts", "tokens")
TOKENS = ("ids", "types", "offsets")


def bytes_per_example(count: int = 2000) -> dict[str, float]:
    """Measure how the size of a store grows with its examples, classes and width.

    Args:
        count: Examples in each store.

    Returns:
        Bytes of an example in each class and in each value of its embedding, and of its index (key and the like).
    """
    classes, width = (2, 202), (8, 208)
    small = _stored_bytes(count, classes[0], width[0])
    per_class = (_stored_bytes(count, classes[1], width[0]) - small) / count / (classes[1] - classes[0])
    per_value = (_stored_bytes(count, classes[0], width[1]) - small) / count / (width[1] - width[0])
    # The growth from count to twice as many: what a store holds once, such as a header, is none of the example's.
    per_example = (_stored_bytes(2 * count, classes[0], width[0]) - small) / count
    index = per_example - classes[0] * per_class - width[0] * per_value
    return {"per_class": per_class, "per_embedding_value": per_value, "index": index}


def _stored_bytes(count: int, classes: int, width: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        store = OutputStore(Path(folder), classes, width)
        store.append(*_random_outputs([(f"text {i}",) for i in range(count)], classes, width))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _random_outputs(inputs: Sequence[TextInput], classes: int, width: int) -> tuple[list[bytes], TeacherOutputs]:
    rng = np.random.default_rng(SEED)
    shapes = ((len(inputs), classes), (len(inputs), width))
    return [content_key(text) for text in inputs], TeacherOutputs(*(rng.standard_normal(s, np.float32) for s in shapes))


def memory_growth(student: Path, counts: tuple[int, int], steps: int) -> dict[str, object]:
    """Compare the peak of resident memory between training on few and on many texts, for the same updates.

    Each runs in a process of its own, with the outputs of all texts in a store on disk beforehand; once from the
    texts, and once from tokens on disk, which shows training without the peak of the tokeniser.

    Args:
        student: A student's folder, with its tokenizer.
        counts: The two numbers of texts.
        steps: Updates in each.

    Returns:
        Growth of the whole process's peak as a factor and in bytes, and the peaks after each stage.
    """
    peaks = {count: _peaks(student, count, steps) for count in counts}
    growth: dict[str, object] = {"steps": steps, "peaks": peaks}
    for start in STARTS:
        few, many = (peaks[count][start]["trained"] for count in counts)
        growth[f"from_{start}"] = {"factor": many / few, "bytes": many - few}
    return growth


def _peaks(student: Path, count: int, steps: int) -> dict[str, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(student), folder, str(count), str(steps)]
        subprocess.run([*command, "fill"], check=True)
        done = {
            start: subprocess.run([*command, start], check=True, capture_output=True, text=True) for start in STARTS
        }
    return {start: json.loads(process.stdout.splitlines()[-1]) for start, process in done.items()}


def peak_memory() -> int:
    """Most resident memory of this process so far, in bytes (Linux; getrusage would count its parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def made_up_texts(count: int) -> list[TextInput]:
    """Write texts of 5 to 30 words, drawn from a few thousand made-up ones."""
    rng = np.random.default_rng(SEED)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, rng.integers(2, 6))) for _ in range(3000)]
    return [(" ".join(words[i] for i in rng.integers(3000, size=rng.integers(5, 31))),) for _ in range(count)]


def fill(student_folder: Path, folder: Path, count: int, part: int = 10_000) -> None:
    """Write tokens and random outputs of all texts, the outputs some at a time."""
    store, texts = OutputStore(folder / "store", len(LABELS), WIDTH), made_up_texts(count)
    for start in range(0, count, part):
        store.append(*_random_outputs(texts[start : start + part], len(LABELS), WIDTH))
    encoded = encode(load_checkpoint(str(student_folder), LABELS).tokenizer, texts, MAX_LENGTH)
    for name in TOKENS:
        np.save(folder / f"{name}.npy", getattr(encoded, name))


def train(student_folder: Path, folder: Path, count: int, steps: int, start: str) -> dict[str, int]:
    """Train on texts whose outputs lie in a store, and note the peak of memory after each stage."""
    peaks: dict[str, int] = {}

    def note(stage: str) -> None:
        peaks[stage] = peak_memory()

    student = load_checkpoint(str(student_folder), LABELS)
    texts = made_up_texts(count)
    note("texts in memory")
    encoded = _tokens(folder, student) if start == "tokens" else encode(student.tokenizer, texts, MAX_LENGTH)
    note("encoded")
    store = OutputStore(folder / "store", len(LABELS), WIDTH)
    outputs, _ = store.read([content_key(text) for text in texts])
    note("outputs read")
    data = DistillationSet(encoded, outputs, np.full(count, -1, np.int64))
    validation = Examples(tuple(texts[:32]), np.arange(32) % 2, LABELS)
    config = KDConfig(warmup_steps=max(1, steps - 2), rounds=1, round_steps=1, evaluate_every=steps)
    KDTrainer(student, config, validation, WIDTH, MAX_LENGTH, SEED).train([data], [1.0], steps)
    note("trained")
    return peaks


def _tokens(folder: Path, student: Student) -> EncodedTexts:
    return EncodedTexts(*(np.load(folder / f"{name}.npy") for name in TOKENS), student.tokenizer.pad_token_id)


def main() -> None:
    """Do one part of ``memory_growth`` in this process: STUDENT FOLDER COUNT STEPS fill|texts|tokens."""
    student, folder, part = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[5]
    count, steps = int(sys.argv[3]), int(sys.argv[4])
    if part == "fill":
        fill(student, folder, count)
    else:
        print(json.dumps(train(student, folder, count, steps, part)))


if __name__ == "__main__":
    main()
