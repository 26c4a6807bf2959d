"""The bootstrap against the binomial's own spread, McNemar against exact values, and the differences they find."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest

from cc_ds.eval.statistics import bootstrap_interval, compare, mcnemar


def test_bootstrap_has_the_spread_of_the_mean():
    scores = [1.0] * 60 + [0.0] * 40
    low, high = bootstrap_interval({"sw": scores}, seed=1, resamples=4000)
    half_width = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert low == pytest.approx(0.6 - half_width, abs=0.015)
    assert high == pytest.approx(0.6 + half_width, abs=0.015)


def test_bootstrap_of_a_macro_average_weighs_groups_the_same_and_redraws_within_them():
    # Groups without spread: redrawing across groups would give an interval, redrawing within gives a point.
    assert bootstrap_interval({"a": [1.0] * 90, "b": [0.0] * 10}) == (0.5, 0.5)
    one = bootstrap_interval({"a": [1.0, 0.0] * 50}, seed=0, resamples=4000)
    two = bootstrap_interval({"a": [1.0, 0.0] * 50, "b": [0.0, 1.0] * 50}, seed=0, resamples=4000)
    assert (two[1] - two[0]) / (one[1] - one[0]) == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_bootstrap_is_seeded_and_refuses_nothing():
    scores = {"a": [0.0, 1.0, 1.0, 0.0, 1.0]}
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores, seed=3)
    for empty in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one score"):
            bootstrap_interval(empty)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 3), (5, 0), (1, 9), (40, 20), (12, 13)])
def test_mcnemar_is_the_binomial(gained, lost):
    rows = gained + lost
    exact = min(1.0, 2 * sum(comb(rows, k) for k in range(min(gained, lost) + 1)) / 2**rows)
    assert mcnemar(gained, lost) == pytest.approx(exact)


def test_mcnemar_of_many_rows():
    assert 0 < mcnemar(5000, 4600) < 1e-4
    assert mcnemar(5000, 4990) > 0.9


def test_pairs_count_not_the_two_spreads():
    """Ten of 100 rows gained and none lost: far clearer than two samples of 50 % and 60 % would be."""
    before = [1.0] * 50 + [0.0] * 50
    after = [1.0] * 60 + [0.0] * 40
    found = compare({"sw": before}, {"sw": after})
    assert found.mean == pytest.approx(0.1) and found.p == pytest.approx(2 * 0.5**10)
    assert 0.04 <= found.low <= 0.06 and 0.14 <= found.high <= 0.17


def test_bootstrap_p_of_shares_is_as_likely_as_it_says():
    """No difference: p below 0.05 in about 5 % of experiments; a difference: nearly always."""
    draw = np.random.default_rng(0)
    null = [compare({"a": draw.random(60)}, {"a": draw.random(60)}, seed, 500).p for seed in range(300)]
    assert 0.02 <= np.mean(np.array(null) < 0.05) <= 0.10
    base = draw.random((2, 60))
    real = compare({"a": base[0], "b": base[1]}, {"a": base[0] + 0.1, "b": base[1] + 0.1})
    assert real.p < 0.01 and real.mean == pytest.approx(0.1)


def test_the_average_weighs_languages_the_same_and_is_signed():
    found = compare({"a": [1.0] * 90, "b": [1.0] * 10}, {"a": [1.0] * 90, "b": [0.0] * 10})
    assert found.mean == -0.5 and found.low == found.high == -0.5 and found.p < 0.01


def test_rows_must_pair():
    with pytest.raises(ValueError, match="same rows"):
        compare({"a": [1.0]}, {"a": [1.0, 0.0]})
