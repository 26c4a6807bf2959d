"""Who reads which rows of a step: as equal in cost as rows allow, over ranks and micro-batches.

A step's rows are given; the loss is a sum over their target tokens, whoever reads them, so dealing them changes nothing
but time. Under ZeRO the ranks wait for each other in every layer, and a rank with long rows keeps the others waiting:
rows are therefore dealt by what they cost, not by their number. Every rank computes the same deal from the lengths of
all rows, without a word to the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens of every row of a data set."""

    target: np.ndarray
    """(rows,) int64: prompt and response."""
    english: np.ndarray
    """(rows,) int64: the English prompt; 0 without one."""
    labels: np.ndarray
    """(rows,) int64: what stands after the anchor, the labels of the loss."""

    @classmethod
    def of(cls, rows: Dataset) -> RowLengths:
        """Read from the offsets of the Arrow columns: no token is touched."""
        table = rows.with_format("arrow")
        columns = [*(pc.list_value_length(table[name]) for name in ("input_ids", "english_input_ids")), table["anchor"]]
        target, english, anchor = (column.to_numpy().astype(np.int64) for column in columns)
        return cls(target, english, target - anchor - 1)


@dataclass(frozen=True, slots=True)
class RowCost:
    """What reading a row costs, in FLOPs: so much per token, and so much per pair of tokens that attend."""

    per_target_token: float
    per_english_token: float
    per_target_pair: float
    per_english_pair: float

    def __call__(self, target: int, english: int) -> float:
        """The cost of a row of so many target and English tokens."""
        return target * (self.per_target_token + target * self.per_target_pair) + english * (
            self.per_english_token + english * self.per_english_pair
        )


def deal(
    costs: Sequence[float], tokens: Sequence[int], ranks: int, micro_batches: int, max_tokens: int = 0
) -> list[list[list[int]]]:
    """Deal a step's rows to micro-batches.

    Args:
        costs: of each row, any unit.
        tokens: of each row, target side.
        ranks: how many share the step; the number of rows is a multiple of it.
        micro_batches: of each rank, unless `max_tokens` says otherwise.
        max_tokens: at most so many target tokens in any micro-batch, in as few micro-batches as that takes; 0: no
            limit. No row may be longer.

    Returns:
        [rank][micro-batch] -> indices of rows, ascending. Every rank has as many micro-batches as the others, and
        those of one number cost about the same. No micro-batch is empty.
    """
    most = len(costs) // ranks
    assert len(costs) == most * ranks and micro_batches <= most
    if max_tokens:
        micro_batches = max(1, -(-sum(tokens) // (ranks * max_tokens)))
    while True:
        bins = _into_bins(costs, ranks * micro_batches)
        if not max_tokens or micro_batches >= most or all(sum(tokens[i] for i in b) <= max_tokens for b in bins):
            break
        micro_batches += 1
    price = [sum(costs[index] for index in each) for each in bins]
    order = sorted(range(len(bins)), key=lambda number: -price[number])
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for start in range(0, len(bins), ranks):
        # The bins of one round run at the same time. The dearest goes to who has paid least so far.
        by_total = sorted(range(ranks), key=lambda rank: totals[rank])
        for number, rank in zip(order[start : start + ranks], by_total, strict=True):
            dealt[rank].append(sorted(bins[number]))
            totals[rank] += price[number]
    return dealt


def _into_bins(costs: Sequence[float], count: int) -> list[list[int]]:
    """Longest processing time first: the dearest row left goes into the cheapest bin."""
    heap = [(0.0, 0, number) for number in range(count)]  # cost, rows, bin: rows, so that none stays empty at cost 0
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        cost, rows, number = heapq.heappop(heap)
        bins[number].append(index)
        heapq.heappush(heap, (cost + costs[index], rows + 1, number))
    return bins
