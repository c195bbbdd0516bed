import copy

import pytest

from l2a.config import StudentConfig
from l2a.student.student import Student, build_student
from l2a.teacher.model import Teacher
from tests.conftest import LABELS


@pytest.fixture(scope="session")
def built_student(loaded_teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Student:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2A_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_student(StudentConfig(max_share=0.9), loaded_teacher, LABELS, (), seed=0)


@pytest.fixture
def student(built_student: Student) -> Student:
    return copy.deepcopy(built_student)
