import pytest

from l2a.config import GeneratorConfig, resolve_degree
from l2a.generator.operators import CHAIN_OPERATORS, OPERATORS, check_operators
from l2a.util.errors import UsageError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("tau", 0.0), ("beta", -0.1), ("degree", 1.5), ("max_degree", -0.1), ("target_share", 1.1), ("chains", 0)],
        *[("burn_in", -1), ("neighbours", 0), ("operators", 3)],
        *[("operators", {"knn": weight}) for weight in (-1.0, float("nan"))],
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(UsageError, match=f"generator.{field} is "):
        GeneratorConfig(**{field: value})


def test_operators_are_checked_by_name():
    with pytest.raises(UsageError, match=r"generator\.operator is 'augpro_mx' \(did you mean 'augpro_mix'\?\)"):
        check_operators(GeneratorConfig(operator="augpro_mx"))
    with pytest.raises(UsageError, match=r"generator\.operators names 'kn' \(did you mean 'knn'\?\)"):
        check_operators(GeneratorConfig(operators={"kn": 1.0}))
    with pytest.raises(UsageError, match="weight above 0"):
        check_operators(GeneratorConfig(operators=dict.fromkeys(CHAIN_OPERATORS, 0.0)))
    with pytest.raises(UsageError, match="mixture names 'knn'"):
        check_operators(GeneratorConfig(mixture={"knn": 0.1}))
    for name in OPERATORS:
        check_operators(GeneratorConfig(operator=name))


@pytest.mark.parametrize(
    ("degree", "inputs", "expected"),
    [("auto", 64, 0.5), ("auto", 9_999, 0.5), ("auto", 10_000, 0.3), ("auto", 100_001, 0.1), (0.25, 64, 0.25)],
)
def test_the_degree_follows_the_amount_of_data(degree, inputs, expected):
    assert resolve_degree(degree, inputs) == expected
