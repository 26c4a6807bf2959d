"""How sure a score is: bootstrap intervals, and whether two models differ on the same rows.

Rows come in groups (languages) that weigh the same in an average, so rows are redrawn within each group. Rows count as
independent: where groups hold translations of one item, the interval of the average is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Groups = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Another model's score minus the baseline's, on the same rows."""

    mean: float
    """Mean over groups of each group's mean difference."""
    low: float
    """Lower end of the 95 % bootstrap interval."""
    high: float
    """Upper end of it."""
    p: float
    """Two-sided probability of a difference this large where there is none; see `compare`."""


def bootstrap_interval(
    scores: Groups, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the macro average (Efron).

    `scores`: one list of row scores per group, none empty; a single group gives the interval of its mean. The same seed
    gives the same interval.
    """
    means = np.zeros(resamples)
    for values, draws in _draws(scores, seed, resamples):
        means += [values[draw].mean() for draw in draws]
    tail = (1 - level) / 2
    low, high = np.quantile(means / len(scores), [tail, 1 - tail])
    return float(low), float(high)


def compare(baseline: Groups, other: Groups, seed: int = 0, resamples: int = 2000) -> Difference:
    """The paired difference of two models' scores; row i of a group is the same row in both.

    One group of right and wrong answers (0 and 1): p of the exact McNemar test (binomial over the rows that one alone
    got right). Otherwise: p of the paired bootstrap, twice the smaller share of resampled differences on either side
    of zero (never below 1 / resamples).

    ValueError: groups that differ, or a group without rows.
    """
    if {g: len(v) for g, v in baseline.items()} != {g: len(v) for g, v in other.items()}:
        raise ValueError("a paired comparison needs the same rows of both models")
    differences = {group: np.subtract(other[group], values) for group, values in baseline.items()}
    means = np.zeros(resamples)
    for values, draws in _draws(differences, seed, resamples):
        means += [values[draw].mean() for draw in draws]
    means /= len(differences)
    low, high = np.quantile(means, [0.025, 0.975])
    if len(differences) == 1 and all(set(v) <= {0.0, 1.0} for g in (baseline, other) for v in g.values()):
        (values,) = differences.values()
        p = mcnemar(int((values > 0).sum()), int((values < 0).sum()))
    else:
        # One more on each side: no finite number of draws shows a probability of zero.
        p = min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (resamples + 1))
    mean = float(np.mean([values.mean() for values in differences.values()]))
    return Difference(mean=mean, low=float(low), high=float(high), p=float(p))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: p where `gained` rows are right in the second model alone, `lost` in the first."""
    rows, fewer = gained + lost, min(gained, lost)
    # Logarithms: the binomials of thousands of rows are beyond a float.
    logs = [math.lgamma(rows + 1) - math.lgamma(k + 1) - math.lgamma(rows - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - rows * math.log(2)) for log in logs))


def _draws(scores: Groups, seed: int, resamples: int) -> Iterator[tuple[NDArray, Iterator[NDArray]]]:
    """Each group's scores and its draws of row indices."""
    if not scores or not all(len(values) for values in scores.values()):
        raise ValueError("a bootstrap interval needs at least one score in every group")
    rng = np.random.default_rng(seed)
    for values in scores.values():
        array = np.asarray(values, dtype=np.float64)
        # One resample at a time: resamples x rows indices at once would not fit for large groups.
        yield array, (rng.integers(len(array), size=len(array)) for _ in range(resamples))
