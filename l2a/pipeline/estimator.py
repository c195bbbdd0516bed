"""The whole run as a classifier of scikit-learn."""

import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.exceptions import NotFittedError

from l2a.pipeline.distill import distill
from l2a.serving.classifier import Classifier, Engine, as_inputs, open_student


class L2AClassifier(Classifier):
    """Distils a student in ``fit`` and classifies with it."""

    def __init__(self, source: Any = None, output_dir: str | Path | None = None, **settings: Any) -> None:
        """Remember a request.

        Args:
            source: The source domain, as ``l2a.distill`` takes it.
            output_dir: Folder of the run; None for one that is removed once the student is in memory.
            **settings: Further arguments of ``l2a.distill``; a teacher may be given by its name alone.
        """
        self.source, self.output_dir, self.settings = source, output_dir, settings

    @cached_property
    def engine(self) -> Engine:
        """The student, which ``fit`` puts here."""
        raise NotFittedError("this L2AClassifier has no student yet; call fit first")

    def fit(self, texts: Any, labels: Iterable[Any]) -> Self:  # type: ignore[override]
        """Distil a student; a fifth of the texts, chosen by a hash, is held back to test it.

        Args:
            texts: Texts or pairs of the target domain.
            labels: Their labels.

        Raises:
            UsageError: If the request or the data are wrong.
            RunError: If the run fails.
        """
        labels = np.asarray(labels)
        pairs = zip(as_inputs(texts), labels, strict=True)
        target = [(text if len(text) == 2 else text[0], str(label)) for text, label in pairs]
        teacher = self.settings.get("teacher")
        settings = self.settings | ({"teacher": {"model": teacher}} if isinstance(teacher, str) else {})
        with tempfile.TemporaryDirectory() as temporary:
            folder = str(self.output_dir or Path(temporary) / "run")
            result = distill(target=target, source=self.source, output_dir=folder, **settings)
            self.engine, self.result_ = open_student(folder), result
        self.__dict__.pop("classes_", None)  # of an earlier fit
        classes = np.unique(labels)  # of the type that they came in, such as int
        if sorted(map(str, classes)) == sorted(self.engine.names):
            self.classes_ = classes
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the student too: its folder may be gone."""
        return dict(self.__dict__)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments that made this classifier."""
        return {"source": self.source, "output_dir": self.output_dir, **self.settings}

    def set_params(self, **params: Any) -> Self:
        """Change arguments that made this classifier."""
        self.__init__(**{**self.get_params(), **params})  # type: ignore[misc]
        return self
