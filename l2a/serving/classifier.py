"""A finished student as a scikit-learn classifier, from PyTorch or ONNX, with calibrated probabilities."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special
from sklearn.base import BaseEstimator, ClassifierMixin

from l2a.data.examples import TextInput
from l2a.util.errors import UsageError
from l2a.util.files import MARK, atomic_write_text, to_json

TEMPERATURES = (0.05, 20.0)  # ends of what is searched: few labels that are all right would ask for a temperature of 0
# Texts are cut at some hundred tokens, so that characters beyond the longest cost nothing.
CHARACTERS_PER_BATCH, LONGEST = 8192, 2048
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class Engine(NamedTuple):
    """An opened student.

    Attributes:
        folder: Where it is.
        model: Of transformers, or a session of onnxruntime.
        names: The C class names, in the order of the logits.
        temperature: What the folder's ``l2a.json`` says that logits are to be divided by, else 1.
        tokenizer: Pads, and cuts at what the model reads; of the ``tokenizers`` library.
        read: Those of ``FIELDS`` that the model reads.
        run: Gives one array, the float32 logits (B, C), for what the model reads, int64 (B, L).
    """

    folder: Path
    model: Any
    names: tuple[str, ...]
    temperature: float
    tokenizer: Any
    read: Sequence[str]
    run: Callable[[dict[str, NDArray[np.int64]]], Sequence[NDArray[np.float32]]]


def open_student(student: str | Path, threads: int | None = None) -> Engine:
    """Open a student.

    Args:
        student: A student folder, a run folder, an ONNX folder (its model.onnx is read) or an .onnx file in one.
        threads: Threads of ONNX; by default OMP_NUM_THREADS, which PyTorch follows as well, or all cores.

    Returns:
        The model with its tokenizer.

    Raises:
        UsageError: If there is no model or it cannot be read.
    """
    path = Path(student).expanduser()
    if not (path / "config.json").is_file() and (path / "student").is_dir():
        path = path / "student"
    file = path if path.suffix == ".onnx" else path / "model.onnx"
    folder = file.parent
    is_torch = file != path and any(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not (is_torch or file.is_file()):
        kinds = "give a student folder, a run folder or an exported ONNX folder"
        raise UsageError(f"student {str(student)!r}: there is no config.json with a model beside it; {kinds}")
    if is_torch:
        return _open_torch(folder)
    try:
        return _open_onnx(file, int(os.environ.get("OMP_NUM_THREADS", "0")) if threads is None else threads)
    except ImportError as error:
        raise UsageError(f"{file}: {error.name} is missing; install it by: pip install 'l2a[export]'") from error
    except Exception as error:  # onnxruntime and tokenizers raise errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"student {str(student)!r} cannot be read ({reason}); write it again by l2a export") from error


def _open_torch(folder: Path) -> Engine:
    from transformers import AutoModelForSequenceClassification

    from l2a.teacher.model import Checkpoint, usable_positions
    from l2a.util.training import best_device

    checkpoint = Checkpoint("student", str(folder))
    model = checkpoint.load(AutoModelForSequenceClassification).to(best_device())
    fitted, tokenizer = checkpoint.tokenizer, checkpoint.tokenizer.backend_tokenizer
    tokenizer.enable_truncation(min(fitted.model_max_length, usable_positions(model) or fitted.model_max_length))
    tokenizer.enable_padding(pad_id=fitted.pad_token_id, pad_token=fitted.pad_token)
    read = [name for name in FIELDS if name in fitted.model_input_names]
    run = partial(run_torch, model)
    return Engine(folder, model, checkpoint.label_names, read_temperature(folder), tokenizer, read, run)


def run_torch(model: Any, batch: Mapping[str, NDArray[np.int64]]) -> Sequence[NDArray[np.float32]]:
    """Run a model of transformers as ``Engine.run`` says."""
    import torch

    with torch.inference_mode():
        given = {name: torch.from_numpy(values).to(model.device) for name, values in batch.items()}
        return [model(**given).logits.cpu().numpy()]


def _open_onnx(file: Path, threads: int) -> Engine:
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    named = json.loads((file.parent / "config.json").read_text("utf-8"))["id2label"]
    names = tuple(str(named[key]) for key in sorted(named, key=int))
    tokenizer = Tokenizer.from_file(str(file.parent / "tokenizer.json"))
    read, run = [one.name for one in session.get_inputs()], partial(session.run, ["logits"])
    return Engine(file.parent, session, names, read_temperature(file.parent), tokenizer, read, run)


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A finished student, opened when it is first used; ``classes_`` are sorted, as scikit-learn wants them."""

    def __init__(self, student: str | Path, threads: int | None = None) -> None:
        """Remember a student; the arguments are those of ``open_student``."""
        self.student = student
        self.threads = threads

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Open a student folder, a run folder, an exported ONNX folder or an .onnx file.

        Raises:
            UsageError: If there is no student or it cannot be read.
        """
        classifier = cls(folder)
        classifier.engine  # noqa: B018
        return classifier

    @cached_property
    def engine(self) -> Engine:
        """The model."""
        return open_student(self.student, self.threads)

    @cached_property
    def classes_(self) -> NDArray[Any]:
        """The C class names, sorted."""
        return np.array(sorted(self.engine.names))

    def fit(self, texts: Any = None, labels: Any = None) -> Self:
        """Return itself: it is trained already, and pipelines ask for this method."""
        return self

    def predict(self, texts: Iterable[Any]) -> NDArray[Any]:
        """Classify texts, strings or pairs of them; gives one of ``classes_`` for each."""
        classes: NDArray[Any] = self.classes_[self.predict_proba(texts).argmax(axis=1)]
        return classes

    def predict_proba(self, texts: Iterable[Any]) -> NDArray[np.float64]:
        """Compute calibrated probabilities, float64 (N, C), in the order of ``classes_``."""
        logits = run(self.engine, as_inputs(texts)).astype(np.float64)
        logits = logits[:, [self.engine.names.index(str(name)) for name in self.classes_]]
        probabilities: NDArray[np.float64] = special.softmax(logits / self.engine.temperature, axis=1)
        return probabilities

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path instead of the model, which ONNX does not let be pickled."""
        return {"student": Path(self.student).expanduser().resolve(), "threads": self.threads}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = not hasattr(self, "student")  # one that distils its student has to
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags


def run(engine: Engine, inputs: Sequence[TextInput]) -> NDArray[np.float32]:
    """Run a model; texts of similar length go together.

    Args:
        engine: The model.
        inputs: N texts, all single or all pairs.

    Returns:
        float32 (N, C), in the order of the model's own class names.
    """
    lengths = np.array([min(LONGEST, sum(map(len, text))) for text in inputs], np.int64)
    order, logits = np.argsort(-lengths, kind="stable"), np.zeros((len(inputs), len(engine.names)), np.float32)
    start = 0
    while start < len(order):
        rows = order[start : start + CHARACTERS_PER_BATCH // max(16, int(lengths[order[start]]))]
        texts = [inputs[row] if len(inputs[row]) == 2 else inputs[row][0] for row in rows]
        encoded = engine.tokenizer.encode_batch_fast(texts)
        fields = {name: [getattr(one, FIELDS[name]) for one in encoded] for name in engine.read}
        (logits[rows],) = engine.run({name: np.array(values) for name, values in fields.items()})
        start += len(rows)
    return logits


def as_inputs(texts: Any) -> list[TextInput]:
    """Turn what scikit-learn passes around (lists, arrays, series, frames of one or two columns) into texts.

    Raises:
        UsageError: If an item is no text and no pair of texts, or there are both.
    """
    items = texts.to_numpy() if hasattr(texts, "to_numpy") else texts  # iterating over a frame gives its columns
    inputs = [tuple(item) if np.ndim(item) and len(item) else (item,) for item in items]
    wrong = next((item for item in inputs if len(item) > 2 or not all(isinstance(side, str) for side in item)), None)
    if isinstance(texts, str) or wrong is not None or len({len(item) for item in inputs}) > 1:
        found = f"{texts!r:.40}" if wrong is None else f"{wrong!r:.40}"
        raise UsageError(f"texts are {found}; give a list of strings, or a list of pairs of strings")
    return inputs


def fit_temperature(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """Fit the temperature that makes labels likeliest (Guo et al., 2017).

    Args:
        logits: float (N, C), of examples that the model was not trained on.
        labels: int64 (N,), their classes.

    Returns:
        The temperature, within ``TEMPERATURES``.
    """

    def loss(log_temperature: float) -> float:
        likelihoods = special.log_softmax(np.asarray(logits, np.float64) / np.exp(log_temperature), axis=1)
        return -float(likelihoods[np.arange(len(labels)), labels].mean())

    return float(np.exp(optimize.minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def write_temperature(folder: Path, temperature: float) -> None:
    """Keep a temperature in a student folder's ``l2a.json``."""
    atomic_write_text(folder / MARK, to_json({"format": 1, "temperature": temperature}, indent=1) + "\n")


def read_temperature(folder: Path) -> float:
    """Read the temperature that a student folder keeps; 1 where it keeps none.

    Raises:
        UsageError: If it is no positive number.
    """
    file = folder / MARK
    try:
        temperature = float(json.loads(file.read_text("utf-8"))["temperature"]) if file.is_file() else 1.0
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        temperature = np.nan
    if not 0 < temperature < np.inf:
        raise UsageError(f"{file}: temperature is no positive number; write one, or remove the file")
    return temperature
