"""Padding and masks; and the stream: every row once an epoch over all ranks, resumed on any number of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from cc_ds.data import BatchStream, CCCollator

PAD = 9


def row(target, response, english, lang="sw"):
    ids = [*range(100, 100 + target), *range(200, 200 + response)]
    return {
        "input_ids": ids,
        "labels": [-100] * target + ids[target:],
        "anchor": target - 1,
        "english_input_ids": list(range(300, 300 + english)),
        "english_anchor": max(0, english - 1),
        "lang": lang,
        "source": f"f:{target}",
    }


def test_right_padding_masks_and_anchors():
    rows = [row(3, 2, 4), row(5, 4, 0, "en"), row(1, 1, 9)]
    batch = CCCollator(PAD)(rows)
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "input_ids": (3, 16),
        "attention_mask": (3, 16),
        "labels": (3, 16),
        "anchors": (3,),
        "english_input_ids": (3, 16),
        "english_attention_mask": (3, 16),
        "english_anchors": (3,),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int64}
    for index, one in enumerate(rows):
        for ids, mask, source in (
            ("input_ids", "attention_mask", one["input_ids"]),
            ("english_input_ids", "english_attention_mask", one["english_input_ids"]),
        ):
            rest = 16 - len(source)
            assert batch[ids][index].tolist() == source + [PAD] * rest
            assert batch[mask][index].tolist() == [1] * len(source) + [0] * rest
        assert batch["labels"][index].tolist() == one["labels"] + [-100] * (16 - len(one["labels"]))
    assert batch["anchors"].tolist() == [2, 4, 0]
    assert batch["english_anchors"].tolist() == [3, 0, 8]
    assert (batch["langs"], batch["sources"]) == (["sw", "en", "sw"], ["f:3", "f:5", "f:1"])


@pytest.mark.parametrize(("longest", "multiple", "padded"), [(8, 8, 8), (9, 8, 16), (7, 1, 7), (5, 64, 64)])
def test_no_more_padding_than_asked(longest, multiple, padded):
    batch = CCCollator(PAD, pad_to_multiple_of=multiple)([row(longest - 1, 1, longest), row(1, 1, 1)])
    assert batch["input_ids"].shape == batch["english_input_ids"].shape == (2, padded)


def test_a_batch_without_english_still_has_an_english_pass():
    batch = CCCollator(PAD)([row(3, 2, 0), row(5, 4, 0)])
    assert batch["english_input_ids"].tolist() == [[PAD] * 8] * 2
    assert batch["english_attention_mask"].sum() == 0
    assert batch["english_anchors"].tolist() == [0, 0]


def test_plain_sft_has_no_english_keys():
    batch = CCCollator(PAD, connect=False)([row(3, 2, 4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "anchors", "langs", "sources"}


def test_collator_faults():
    with pytest.raises(ValueError, match="pad_token"):
        CCCollator(None)
    with pytest.raises(ValueError, match="at least 1"):
        CCCollator(0, pad_to_multiple_of=0)


def take(rows, batch_size, steps, seed=0, state=None):
    """What `steps` steps get, in order; and the state after."""
    stream = BatchStream(range(rows), batch_size, seed)
    if state is not None:
        stream.load_state_dict(state)
    taken = [next(stream) for _ in range(steps)]
    return list(itertools.chain.from_iterable(taken)), stream.state_dict()


def test_each_row_once_an_epoch():
    taken, state = take(rows=24, batch_size=6, steps=8)
    first, second = taken[:24], taken[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != list(range(24))
    assert state["position"] == 48


def test_batches_reach_over_the_end_of_an_epoch():
    taken, _ = take(rows=10, batch_size=8, steps=5)
    assert [sorted(taken[start : start + 10]) for start in range(0, 40, 10)] == [list(range(10))] * 4


def test_fewer_rows_than_one_step():
    taken, _ = take(rows=3, batch_size=8, steps=3)
    assert [sorted(taken[start : start + 3]) for start in range(0, 24, 3)] == [[0, 1, 2]] * 8


@pytest.mark.parametrize(("batch_size", "steps"), [(12, 3), (2, 18), (4, 9), (36, 1)])
def test_resume_in_the_middle_of_an_epoch_with_another_batch_size(batch_size, steps):
    whole, _ = take(rows=17, batch_size=6, steps=12)
    before, state = take(rows=17, batch_size=6, steps=6)
    after, _ = take(rows=17, batch_size=batch_size, steps=steps, state=state)
    assert before + after == whole


def test_order_follows_seed_and_epoch_alone():
    taken, _ = take(rows=50, batch_size=5, steps=10)
    torch.manual_seed(123)
    assert take(rows=50, batch_size=5, steps=10)[0] == taken
    assert take(rows=50, batch_size=5, steps=10, seed=1)[0] != taken


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(rows=20, batch_size=4, steps=10)
    assert torch.equal(torch.rand(3), expected)


def test_position_given_and_epoch():
    stream = BatchStream(range(10), 6, position=6)
    other = BatchStream(range(10), 6)
    next(other)
    assert next(stream) == next(other)
    assert stream.epoch == 1.2


def test_resume_with_other_data_or_seed_is_refused():
    state = BatchStream(range(10), 2).state_dict()
    with pytest.raises(ValueError, match="rows 10, this run has 11"):
        BatchStream(range(11), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0, this run has 5"):
        BatchStream(range(10), 2, seed=5).load_state_dict(state)


def test_impossible_streams():
    for options in ({"batch_size": 0}, {"batch_size": 1, "position": -1}):
        with pytest.raises(ValueError, match="impossible stream"):
            BatchStream(range(3), **options)
    with pytest.raises(ValueError, match="empty"):
        BatchStream([], 1)
