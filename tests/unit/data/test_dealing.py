"""Dealing: every row once, equal in number of micro-batches, near equal in cost, within the token limit."""

from __future__ import annotations

import random

import pytest
from datasets import Dataset

from cc_ds.data.dealing import RowCost, RowLengths, deal


def _lengths(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [min(1000, int(draw.lognormvariate(4.5, 0.8)) + 8) for _ in range(count)]


@pytest.mark.parametrize(
    ("rows", "ranks", "micro_batches", "limit"),
    [(8, 1, 1, 0), (8, 8, 1, 0), (64, 2, 4, 0), (64, 4, 2, 1500), (12, 3, 4, 0), (30, 3, 1, 1001), (6, 2, 1, 10**6)],
)
def test_every_row_once_and_no_micro_batch_empty(rows, ranks, micro_batches, limit):
    tokens = _lengths(rows)
    dealt = deal([float(length) for length in tokens], tokens, ranks, micro_batches, limit)
    assert sorted(index for rank in dealt for batch in rank for index in batch) == list(range(rows))
    assert len(dealt) == ranks and len({len(rank) for rank in dealt}) == 1
    assert all(batch == sorted(batch) and batch for rank in dealt for batch in rank)
    if limit:
        assert all(sum(tokens[index] for index in batch) <= limit for rank in dealt for batch in rank)
    else:
        assert len(dealt[0]) == micro_batches


def test_the_limit_alone_says_how_many_micro_batches():
    assert [len(rank) for rank in deal([1.0] * 16, [100] * 16, 2, 4, max_tokens=10_000)] == [1, 1]
    assert [len(rank) for rank in deal([1.0] * 16, [100] * 16, 2, 1, max_tokens=250)] == [4, 4]


def test_ranks_cost_the_same_within_a_few_percent():
    """Real lengths differ by a factor of ten; in their own order, one of 4 ranks would have a quarter more to do."""
    worst, naive = 0.0, 0.0
    for seed in range(20):
        costs = [float(length) for length in _lengths(4 * 16, seed)]
        dealt = deal(costs, [1] * 64, ranks=4, micro_batches=2)
        totals = [sum(costs[index] for batch in rank for index in batch) for rank in dealt]
        worst = max(worst, max(totals) * 4 / sum(totals) - 1)
        naive += max(sum(costs[start : start + 16]) for start in range(0, 64, 16)) * 4 / sum(costs) / 20 - 1 / 20
        for rounds in zip(*dealt, strict=True):  # what runs at the same time
            at_once = [sum(costs[index] for index in batch) for batch in rounds]
            assert max(at_once) < 1.08 * min(at_once)
    assert worst < 0.02 and naive > 0.15


def test_rows_without_cost_still_fill_every_micro_batch():
    assert all(batch for rank in deal([0.0] * 4, [1] * 4, 2, 2) for batch in rank)


def test_lengths_and_cost():
    rows = Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4, 5]], "english_input_ids": [[], [5, 6]], "anchor": [0, 0]},
    )
    lengths = RowLengths.of(rows)
    assert lengths.target.tolist() == [3, 2] and lengths.english.tolist() == [0, 2]
    assert lengths.labels.tolist() == [2, 1]
    assert RowLengths.of(rows.select([1])).target.tolist() == [2]
    assert RowCost(10, 20, 1, 2)(3, 2) == 30 + 9 + 40 + 8
