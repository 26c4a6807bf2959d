"""How sure a score is: bootstrap intervals, and whether two models differ on the same rows.

Rows come in groups (languages) that weigh the same in an average. Rows of one item, as translations of one question
are, rise and fall together: a bootstrap that redraws them one by one makes intervals of averages too narrow (two equal
models on eight languages came out at p < 0.05 in 15 to 38 % of simulated cases). So whole items are redrawn, in all
their languages at once: a cluster bootstrap (Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Groups = Mapping[str, Sequence[float]]
# Each row's item, in the order of its group's scores; rows of one item share it, also over groups.
Items = Mapping[str, Sequence[Hashable]]


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
    scores: Groups, seed: int = 0, resamples: int = 1000, level: float = 0.95, items: Items | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the macro average (Efron).

    `scores`: one list of row scores per group, none empty; a single group gives the interval of its mean. `items`: by
    default every row is an item of its own. The same seed gives the same interval.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(_redrawn_means(scores, items, seed, resamples), [tail, 1 - tail])
    return float(low), float(high)


def compare(
    baseline: Groups, other: Groups, seed: int = 0, resamples: int = 2000, items: Items | None = None
) -> Difference:
    """The paired difference of two models' scores; row i of a group is the same row in both, and of item i in `items`.

    One group of right and wrong answers (0 and 1): p of the exact McNemar test (binomial over the rows that one alone
    got right). Otherwise: p of the paired bootstrap, twice the smaller share of resampled differences on either side
    of zero (never below 1 / resamples).

    ValueError: groups that differ, or a group without rows.
    """
    if {g: len(v) for g, v in baseline.items()} != {g: len(v) for g, v in other.items()}:
        raise ValueError("a paired comparison needs the same rows of both models")
    differences = {group: np.subtract(other[group], values) for group, values in baseline.items()}
    means = _redrawn_means(differences, items, seed, resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    if len(differences) == 1 and all(set(v) <= {0.0, 1.0} for g in (baseline, other) for v in g.values()):
        (values,) = differences.values()
        p = mcnemar(int((values > 0).sum()), int((values < 0).sum()))
    else:
        # One more on each side: no finite number of draws shows a probability of zero.
        p = min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (resamples + 1))
    return Difference(mean=_macro_average(differences), low=float(low), high=float(high), p=float(p))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: p where `gained` rows are right in the second model alone, `lost` in the first."""
    rows, fewer = gained + lost, min(gained, lost)
    # Logarithms: the binomials of thousands of rows are beyond a float.
    logs = [math.lgamma(rows + 1) - math.lgamma(k + 1) - math.lgamma(rows - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - rows * math.log(2)) for log in logs))


def _macro_average(scores: Groups) -> float:
    return float(np.mean([np.mean(values) for values in scores.values()]))


def _redrawn_means(scores: Groups, items: Items | None, seed: int, resamples: int) -> NDArray:
    """(resamples,): the macro average after each redraw of the items.

    An item's share of the average is the sum of its rows' deviations from their group's mean, each divided by the rows
    of the group and by the groups. Items of one group alone are redrawn within it, items of several among each other;
    where no item is shared, that is the bootstrap within groups.
    """
    if not scores or not all(len(values) for values in scores.values()):
        raise ValueError("a bootstrap interval needs at least one score in every group")
    shares: dict[Hashable, float] = defaultdict(float)
    groups_of: dict[Hashable, set[str]] = defaultdict(set)
    for group, values in scores.items():
        array = np.asarray(values, dtype=np.float64)
        keys = [(group, place) for place in range(len(array))] if items is None else items[group]
        for key, share in zip(keys, (array - array.mean()) / (len(array) * len(scores)), strict=True):
            shares[key] += share
            groups_of[key].add(group)
    strata = defaultdict(list)
    for key, share in shares.items():
        strata[min(groups_of[key]) if len(groups_of[key]) == 1 else None].append(share)
    rng = np.random.default_rng(seed)
    means = np.full(resamples, _macro_average(scores))
    for stratum in map(np.asarray, strata.values()):
        # One resample at a time: resamples x items indices at once would not fit for large groups.
        means += [stratum[rng.integers(len(stratum), size=len(stratum))].sum() for _ in range(resamples)]
    return means.round(12)  # a difference of zero is zero, whatever its terms were rounded to
