import copy

import pytest

from l2a.config import StudentConfig
from l2a.student.student import build_student
from tests.conftest import LABELS


@pytest.fixture(scope="session")
def built_student(loaded_teacher, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2A_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_student(StudentConfig(max_share=0.9), loaded_teacher, LABELS, (), seed=0)


@pytest.fixture
def student(built_student):
    return copy.deepcopy(built_student)
