"""Packing: every token, label and anchor of every row, at its place."""

from __future__ import annotations

import torch
from tiny_models import tokenised_rows

from cc_ds.data.packing import pack, share


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


def _prompts(english, english_of) -> list[list[int]]:
    """The token ids of the prompt that each connected row reads; its anchor is checked on the way."""
    ids = [part.tolist() for part in english.input_ids[0].split(english.lengths)]
    assert [english.input_ids[0, anchor].item() for anchor in english.anchors] == [part[-1] for part in ids]
    assert english.position_ids[0].tolist() == [t for part in ids for t in range(len(part))]
    return [ids[index] for index in torch.arange(len(ids))[english_of].tolist()]


def _with_twins() -> list[dict]:
    """Rows of which the first, third and sixth have one English prompt."""
    rows = tokenised_rows(count=8)
    twin = {name: rows[0][name] for name in ("english_input_ids", "english_anchor")}
    return [row | twin if index in (2, 5) else row for index, row in enumerate(rows)]


def test_an_english_prompt_of_several_rows_is_packed_once():
    rows = _with_twins()
    batch = pack(rows, 0)
    wanted = [row["english_input_ids"] for row in rows if row["english_input_ids"]]
    assert _prompts(batch.english, batch.english_of) == wanted
    assert len(batch.english.lengths) == len(wanted) - 2
    assert isinstance(pack(rows[3:], 0).english_of, slice)  # nothing twice there: a view will do


def test_share_reads_the_prompts_of_several_batches_once():
    rows = _with_twins()
    parts = [rows[:4], rows[4:7], [rows[1]]]
    batches = [pack(part, 9) for part in parts]
    english, shared = share(batches)
    wanted = [[row["english_input_ids"] for row in part if row["english_input_ids"]] or [[9]] for part in parts]
    assert [_prompts(english, batch.english_of) for batch in shared] == wanted
    assert len(english.lengths) == len({tuple(prompt) for part in wanted for prompt in part})
    assert all(batch.english is None for batch in shared)
    assert [batch.connected.all().item() for batch in shared] == [True, True, False]
