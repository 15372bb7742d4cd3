"""Statistics of a comparison over seeds: pure functions of scores, each with the source of its method."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np

SIGNIFICANT = 0.05
CONFIDENCE = 0.95
MIN_SEEDS = 3  # for an interval or a test of spreads; two values say nothing about how far a third would be off
RESAMPLES = 9999

Key = TypeVar("Key", bound=Hashable)


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """An arm beside another one, paired by seed.

    Attributes:
        against: the other arm.
        seeds: those that both have.
        values: the arm's score minus the other's, by seed.
        mean: of `values`.
        interval: bootstrap 95% interval of the mean; None with fewer than three seeds or when all values are equal.
        p_value: paired t-test; None with one seed or when all values are equal.
        holm: `p_value` corrected for the other arms of the same table.
        probability: that the arm beats the other.
    """

    against: str
    seeds: list[int]
    values: list[float]
    mean: float
    interval: Interval | None
    p_value: float | None
    probability: float
    holm: float | None = None


def difference(arm: Mapping[int, float], other: Mapping[int, float], against: str) -> Difference | None:
    """Compare two arms on the seeds that both have; None when there are none.

    Args:
        arm: score by seed.
        other: score by seed of the arm to compare with.
        against: the name of that arm.
    """
    if not (seeds := sorted(arm.keys() & other.keys())):
        return None
    ours, theirs = ([scores[seed] for seed in seeds] for scores in (arm, other))
    values = np.subtract(ours, theirs)
    return Difference(
        against=against,
        seeds=seeds,
        values=values.tolist(),
        mean=float(values.mean()),
        interval=bootstrap_interval(values, scale=max(map(abs, (*ours, *theirs)))),
        p_value=paired_p_value(ours, theirs),
        probability=probability_of_improvement(ours, theirs),
    )


def bootstrap_interval(values: Sequence[float] | np.ndarray, scale: float = 1.0) -> Interval | None:
    """Bias-corrected and accelerated bootstrap 95% interval of the mean (Efron 1987).

    It cannot reach beyond the values themselves. If their distribution is symmetric, all n lie on the same side of the
    true mean with probability 2^(1-n), so at most 75% (n = 3), 94% (n = 5) or 99.8% (n = 10) of such intervals
    contain it, however many resamples are drawn. BCa is not defined for values that are all equal (and only then for a
    mean): there is no interval, because the percentiles would be that very value and look like certainty.

    Args:
        values: n numbers.
        scale: size of the numbers that `values` are differences of: variation below 1e-9 of it is rounding.

    Returns:
        The interval, or None with fewer than three values or equal ones.
    """
    if len(values) < MIN_SEEDS or _all_equal(values, scale):
        return None
    from scipy import stats  # takes long, and a command line that is refused needs none of it

    # random_state and not rng: the oldest supported scipy knows only that.
    result = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="BCa",
        random_state=0,
    ).confidence_interval
    return Interval(float(result.low), float(result.high))


def paired_p_value(arm: Sequence[float], other: Sequence[float]) -> float | None:
    """Compute the two-sided p value of the paired t-test (Student 1908); None where it is not defined.

    It is not with one pair. With differences that are all equal t is 0/0 or infinite, and p would be nan, or 0: a
    certainty that a few equal numbers do not give.
    """
    if len(arm) < 2 or _all_equal(np.subtract(arm, other), max(map(abs, (*arm, *other)))):
        return None
    from scipy import stats

    return float(stats.ttest_rel(arm, other).pvalue)


def probability_of_improvement(arm: Sequence[float], other: Sequence[float]) -> float:
    """P(X > Y) + P(X = Y) / 2 for a run X of the arm and a run Y of the other, over all pairs of runs.

    The Mann-Whitney U statistic over the number of pairs (Agarwal et al. 2021, arXiv 2108.13264); 0.5 is a tie.
    """
    from scipy import stats

    return float(stats.mannwhitneyu(arm, other).statistic / (len(arm) * len(other)))


def holm(p_values: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """p values corrected for testing several hypotheses at once (Holm 1979).

    The i-th smallest of n (i = 0, 1, ...) is multiplied by n - i, is at least as large as the one before it, and at
    most 1. The probability of any false positive at level 0.05 is then at most 0.05. None (no test) is not counted.
    """
    ordered = sorted(((p, key) for key, p in p_values.items() if p is not None), key=lambda pair: pair[0])
    corrected: dict[Key, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for position, (p, key) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - position) * p))
        corrected[key] = largest
    return corrected


def with_holm(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """Return the same differences by arm, with the correction over all of them."""
    corrected = holm({arm: found.p_value for arm, found in differences.items()})
    return {arm: replace(found, holm=corrected[arm]) for arm, found in differences.items()}


def spread_ratio(arm: Mapping[int, float], other: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Standard deviation over seeds as a ratio to the other arm's, and the p value of the Pitman-Morgan test.

    The test of equal variances for paired samples (Pitman 1939, Morgan 1939): x + y and x - y are uncorrelated if and
    only if var x = var y. The F test would need independent arms, but a seed is the same initialisation and data
    order in each; Levene's medians see next to nothing in three to five values, and a bootstrap of the ratio divides
    by the zero spread of resamples that drew one seed only.

    Returns:
        (ratio, p), each None where it is not defined: fewer than three common seeds, or an arm without spread.
    """
    seeds = sorted(arm.keys() & other.keys())
    ours, theirs = (np.array([scores[seed] for seed in seeds]) for scores in (arm, other))
    if len(seeds) < MIN_SEEDS or any(_all_equal(scores, float(np.abs(scores).max())) for scores in (ours, theirs)):
        return None, None
    ratio = float(ours.std(ddof=1) / theirs.std(ddof=1))
    total, change = ours + theirs, ours - theirs
    scale = float(np.abs(total).max())
    if _all_equal(total, scale) or _all_equal(change, scale):
        return ratio, None
    from scipy import stats

    return ratio, float(stats.pearsonr(total, change).pvalue)


def _all_equal(values: Sequence[float] | np.ndarray, scale: float) -> bool:
    return float(np.ptp(values)) <= 1e-9 * scale
