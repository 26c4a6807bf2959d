"""Packing: every token, label and anchor of every row, at its place."""

from __future__ import annotations

import torch
from tiny_models import tokenised_rows

from cc_ds.data.packing import join, pack


def test_tokens_positions_and_anchors():
    rows = tokenised_rows()
    batch = pack(rows, 0)
    assert batch.target.input_ids[0].tolist() == [token for row in rows for token in row["input_ids"]]
    assert batch.target.lengths == tuple(len(row["input_ids"]) for row in rows)
    start = 0
    for row, anchor in zip(rows, batch.target.anchors.tolist(), strict=True):
        end = start + len(row["input_ids"])
        assert batch.target.position_ids[0, start:end].tolist() == list(range(end - start))
        assert anchor == start + row["anchor"]
        start = end


def test_each_label_is_predicted_from_the_token_before_it_in_its_row():
    rows = tokenised_rows()
    batch = pack(rows, 0)
    expected = []
    start = 0
    for row in rows:
        expected += [(start + t - 1, label) for t, label in enumerate(row["labels"]) if label != -100]
        start += len(row["input_ids"])
    assert list(zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True)) == expected


def test_a_label_on_the_first_token_has_nothing_before_it():
    row = tokenised_rows()[0]
    free = row | {"labels": list(row["input_ids"])}
    batch = pack([row, free], 0)
    assert len(batch.labels) == sum(label != -100 for label in row["labels"]) + len(free["labels"]) - 1
    starts = batch.target.lengths[0]
    assert starts - 1 not in batch.label_positions.tolist()


def test_english_prompts_and_whose_they_are():
    rows = tokenised_rows()
    batch = pack(rows, 0)
    assert batch.connected_rows.tolist() == [0, 2, 3] and batch.connected.all()
    assert batch.english.input_ids[0].tolist() == [t for row in rows for t in row["english_input_ids"]]
    ends = torch.tensor(batch.english.lengths).cumsum(0)
    assert batch.english.anchors.tolist() == (ends - 1).tolist()


def test_plain_sft_and_a_batch_without_english():
    rows = [row | {"english_input_ids": []} for row in tokenised_rows()]
    assert pack(tokenised_rows(), 0, connect=False).english is None
    stand_in = pack(rows, 9)
    assert stand_in.english.input_ids.tolist() == [[9]] and stand_in.connected.tolist() == [False]


def test_join():
    parts = [pack(tokenised_rows(seed), 0).english for seed in range(3)]
    whole = join(parts)
    ids = whole.input_ids[0]
    assert ids.tolist() == [token for part in parts for token in part.input_ids[0].tolist()]
    assert torch.equal(ids[whole.anchors], torch.cat([part.input_ids[0][part.anchors] for part in parts]))
    assert sum(whole.lengths) == len(ids) == whole.position_ids.shape[1]
