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


def equal_models(seed: int) -> tuple[dict, dict]:
    """Two models, right as often, on the same 100 items in eight languages; each is good at items of its own."""
    draw = np.random.default_rng(seed)
    able = draw.normal(size=(2, 1, 100)) + 0.5 * draw.normal(size=(2, 8, 100)) > 0
    return tuple({f"l{n}": right for n, right in enumerate(model.astype(float))} for model in able)


def test_translations_of_an_item_are_not_counted_as_so_many_items():
    items = {f"l{n}": range(100) for n in range(8)}
    apart, together = (
        np.mean([compare(*equal_models(seed), seed, 300, items=these).p < 0.05 for seed in range(count)])
        for these, count in ((None, 50), (items, 200))
    )
    assert apart > 0.25, "the rows are correlated enough for this test to mean anything"
    assert 0.02 <= together <= 0.08
    base, _ = equal_models(0)
    wide, narrow = (bootstrap_interval(base, items=these) for these in (items, None))
    spread = np.mean(list(base.values()), axis=0).std() / 10
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * spread, rel=0.1) and narrow[1] - narrow[0] < 0.6 * spread * 4


def test_a_language_that_holds_a_part_of_the_items():
    """The interval's width is that of the ratio estimator, whatever a language lacks."""
    draw = np.random.default_rng(0)
    effect = draw.normal(size=400)
    scores = {"a": effect + 0.1 * draw.normal(size=400), "b": effect[:250] + 0.1 * draw.normal(size=250)}
    items = {"a": range(400), "b": range(250)}
    share = (scores["a"] - scores["a"].mean()) / 800
    share[:250] += (scores["b"] - scores["b"].mean()) / 500
    low, high = bootstrap_interval(scores, resamples=4000, items=items)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt((share**2).sum()), rel=0.08)


@pytest.mark.parametrize("items", [None, {"a": ["x", "y", "z", "u"], "b": ["v", "w"]}])
def test_where_no_item_is_shared_rows_are_redrawn_within_groups(items):
    scores = {"a": np.array([0.0, 1.0, 0.5, 0.2]), "b": np.array([1.0, 0.0])}
    rng, means = np.random.default_rng(5), np.zeros(300)
    for values in scores.values():
        means += [values[rng.integers(len(values), size=len(values))].mean() for _ in range(300)]
    expected = np.quantile(means / 2, [0.025, 0.975])
    assert bootstrap_interval(scores, 5, 300, items=items) == pytest.approx(tuple(expected))
