import pytest

from l2a.config import GeneratorConfig, OperatorWeights, resolve_degree
from l2a.util.errors import UsageError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tau", 0.0),
        ("tau", -1.0),
        ("beta", -0.1),
        ("degree", 0.0),
        ("degree", 1.5),
        ("max_degree", -0.1),
        ("target_share", 1.1),
        ("chains", 0),
        ("burn_in", -1),
        ("neighbours", 0),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(UsageError, match=f"generator.{field} is {value}"):
        GeneratorConfig(**{field: value})


@pytest.mark.parametrize("weights", [(0, 0, 0, 0), (1, -1, 1, 1)])
def test_weights_make_a_distribution(weights):
    with pytest.raises(UsageError, match=r"generator\.operators"):
        OperatorWeights(*weights)


@pytest.mark.parametrize(
    ("degree", "inputs", "expected"),
    [("auto", 64, 0.5), ("auto", 9_999, 0.5), ("auto", 10_000, 0.3), ("auto", 100_001, 0.1), (0.25, 64, 0.25)],
)
def test_the_degree_follows_the_amount_of_data(degree, inputs, expected):
    assert resolve_degree(degree, inputs) == expected
