"""The statistics of a comparison beside formulas written out, exact enumeration and published examples."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from comparison.statistics import (
    bootstrap_interval,
    difference,
    holm,
    paired_p_value,
    probability_of_improvement,
    spread_ratio,
    with_holm,
)


def exact_bca(values, level=0.95):
    """BCa of the mean from all n^n resamples (Efron and Tibshirani 1993, section 14.3)."""
    n, mean = len(values), np.mean(values)
    means = np.sort([np.mean(chosen) for chosen in itertools.product(values, repeat=n)])
    z0 = stats.norm.ppf((np.mean(means < mean - 1e-12) + np.mean(means <= mean + 1e-12)) / 2)
    jackknife = np.array([np.mean(np.delete(values, i)) for i in range(n)])
    off = jackknife.mean() - jackknife
    a = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    z = stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    return np.quantile(means, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))))


@pytest.mark.parametrize(
    "values", [[0.5, 1.2, -0.4, 2.0, 3.1], [0.1, 0.2, 0.3, 5.0, 0.15], [-1.0, 0.2, 0.7, -0.3, 1.5]]
)
def test_interval_is_that_of_all_resamples(values):
    found = bootstrap_interval(values)
    assert np.allclose(found, exact_bca(values), atol=0.05 * np.ptp(values))
    assert min(values) <= found.low < np.mean(values) < found.high <= max(values)
    assert bootstrap_interval(values) == found  # the same every time


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [0.3, 0.1 + 0.2, 0.3]])
def test_no_interval_where_it_would_only_look_like_one(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_interval(values) is None


def test_paired_test_is_students():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3), and with two degrees of freedom p = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    assert paired_p_value([11, 22, 33], [10, 20, 30]) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    # With one degree of freedom it is Cauchy's: differences 1 and 3, t = 2.
    assert paired_p_value([11, 23], [10, 20]) == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert paired_p_value([10, 20, 30], [11, 22, 33]) == paired_p_value([11, 22, 33], [10, 20, 30])


@pytest.mark.parametrize(
    ("arm", "other"), [([1.0], [2.0]), ([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [0, 1, 2]), ([70.1, 70.2], [70.0, 70.1])]
)
def test_no_p_value_without_variation(arm, other):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_p_value(arm, other) is None


@pytest.mark.parametrize(
    ("arm", "other", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([1, 2, 3], [2], 0.5),
        ([1, 4, 2], [2, 0, 3], 5.5 / 9),
    ],
)
def test_probability_counts_pairs_with_ties_half(arm, other, expected):
    naive = [(x > y) + (x == y) / 2 for x in arm for y in other]
    assert probability_of_improvement(arm, other) == pytest.approx(expected) == pytest.approx(np.mean(naive))


def test_holm():
    # The smallest times 4, the next times 3, 2, 1; 0.04 * 1 is raised to the 0.06 before it.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.5, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.02, "b": None, "c": 0.02}) == {"a": 0.04, "b": None, "c": 0.04}  # no test is no hypothesis
    assert holm({}) == {}


def test_spread_is_compared_as_pitman_and_morgan_did():
    rng = np.random.default_rng(0)
    other = rng.normal(70, 1, 6)
    arm = other * 0.5 + rng.normal(36, 0.6, 6)
    # Their t in terms of the ratio of variances F and the correlation r.
    ratio, r = arm.var(ddof=1) / other.var(ddof=1), np.corrcoef(arm, other)[0, 1]
    t = (ratio - 1) * math.sqrt(4) / (2 * math.sqrt(ratio * (1 - r * r)))
    found, p = spread_ratio(dict(enumerate(arm)), dict(enumerate(other)))
    assert found == pytest.approx(math.sqrt(ratio)) and p == pytest.approx(2 * stats.t.sf(abs(t), 4))


@pytest.mark.parametrize(
    ("arm", "other", "expected"),
    [
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 3.0}, (None, None)),  # two seeds
        ({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 3.0, 2: 2.0}, (None, None)),  # no spread
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 3.0, 2: 4.0}, (1.0, None)),  # always one more
        ({0: 1.0, 1: 2.0, 2: 3.0, 5: 9.0}, {0: 3.0, 1: 2.0, 2: 1.0}, (1.0, None)),  # the sum is always 4
    ],
)
def test_spread_where_the_test_is_not_defined(arm, other, expected):
    assert spread_ratio(arm, other) == expected


def test_differences_are_of_common_seeds():
    found = difference({0: 5.0, 2: 7.0, 1: 5.5}, {2: 4.0, 0: 4.0, 9: 0.0}, "baseline")
    assert (found.against, found.seeds, found.values, found.mean) == ("baseline", [0, 2], [1.0, 3.0], 2.0)
    assert found.interval is None and found.p_value == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert found.probability == 1.0
    assert difference({0: 1.0}, {1: 1.0}, "baseline") is None


def test_correction_is_over_the_arms():
    base = {0: 1.0, 1: 2.0, 2: 4.0}
    arms = {"a": {0: 2.0, 1: 3.5, 2: 5.0}, "b": {0: 1.5, 1: 2.0, 2: 4.5}}
    found = with_holm({name: difference(scores, base, "baseline") for name, scores in arms.items()})
    first, second = sorted((found["a"], found["b"]), key=lambda one: one.p_value)
    assert first.holm == pytest.approx(2 * first.p_value) and second.holm == max(second.p_value, first.holm)
