import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from l2a.generator.chain import fit_target_density
from l2a.util.errors import UsageError


def two_domains(source_count: int, target_count: int, seed: int = 0, width: int = 48):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.linspace(2.0, 0.1, width)
    source = rng.normal(size=(source_count, width)) @ mixing
    target = (rng.normal(size=(target_count, width)) * 0.7 + 1.5 * (np.arange(width) < 6)) @ mixing
    return source.astype(np.float32), target.astype(np.float32)


@pytest.mark.parametrize("target_count", [2, 8, 64, 8000])
def test_held_out_target_text_ranks_above_source_text(target_count):
    source, target = two_domains(600, target_count + 200)
    density = fit_target_density(source[:400], target[:target_count])
    values = density.log_density(np.concatenate([source[400:], target[target_count:]]))
    assert np.isfinite(values).all()
    assert roc_auc_score(np.repeat([0, 1], 200), values) > (0.5 if target_count == 2 else 0.75)


def test_the_scale_does_not_depend_on_the_unit_of_the_embeddings():
    source, target = two_domains(300, 32)
    one, other = fit_target_density(source, target), fit_target_density(100 * source, 100 * target)
    assert one.log_density(source) == pytest.approx(other.log_density(100 * source), abs=1e-2)


@pytest.mark.parametrize("shift", [0.0, 1.0, 1000.0])
def test_the_target_lies_at_most_two_units_above_the_source(shift):
    source, target = two_domains(300, 32)
    density = fit_target_density(source, target + np.float32(shift))
    values, target_values = density.log_density(source), density.log_density(target + np.float32(shift))
    assert np.median(values) == pytest.approx(0, abs=1e-6)
    assert 0 < target_values.mean() - values.mean() <= 2.0001


def test_fewer_points_than_dimensions_and_constant_embeddings_stay_finite():
    source, target = two_domains(5, 3)
    assert np.isfinite(fit_target_density(source, target).log_density(1000 * source)).all()
    same = np.ones((4, 6), dtype=np.float32)
    density = fit_target_density(same, same[:2])
    assert np.isfinite(density.log_density(same)).all() and np.isfinite(density.log_odds(same)).all()


def test_the_log_odds_tell_the_domains_apart_with_equal_priors():
    source, target = two_domains(400, 40)
    density = fit_target_density(source[:200], target[:20])
    assert expit(density.log_odds(source[200:])).mean() < 0.35
    assert expit(density.log_odds(target[20:])).mean() > 0.65


@pytest.mark.parametrize(("sources", "targets"), [(1, 8), (8, 1), (8, 0)])
def test_too_few_texts_are_refused(sources, targets):
    source, target = two_domains(8, 8)
    with pytest.raises(UsageError, match="at least 2 of each domain"):
        fit_target_density(source[:sources], target[:targets])
