"""What a preset is built from: the teacher, the classes, the domains' texts and the size that is allowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from l2a.examples import TextInput
from l2a.teacher.model import Teacher


@dataclass(frozen=True)
class StudentRequest:
    """One student wanted.

    Attributes:
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels; they say which tokens are worth keeping.
        max_share: Largest allowed share of the teacher's parameters.
    """

    teacher: Teacher
    label_names: tuple[str, ...]
    texts: Sequence[TextInput]
    max_share: float

    @property
    def budget(self) -> int:
        """Parameters allowed."""
        return int(self.max_share * self.teacher.parameters_count)

    @property
    def of_pairs(self) -> bool:
        """Whether the student is to read two texts at a time."""
        return bool(self.texts) and len(self.texts[0]) == 2

    @property
    def width(self) -> int:
        """Width d of the teacher; word vectors cannot be wider."""
        return self.teacher.hidden_size

    @property
    def positions(self) -> int:
        """Longest sequence that a fresh student reads, in tokens."""
        return min(512, int(self.teacher.encoder.config.max_position_embeddings))

    @property
    def layers(self) -> int:
        """Layers of a fresh student: a third of the teacher's, at least two."""
        return max(2, int(self.teacher.encoder.config.num_hidden_layers) // 3)

    def labels(self) -> dict[str, Any]:
        """Name the classes as a config of transformers wants them."""
        names = dict(enumerate(self.label_names))
        return {"id2label": names, "label2id": {name: index for index, name in names.items()}}
