"""The feed: each rank's rows, noise by row, one step ahead, and a state that counts what was used."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny_models import LAYERS, tokenised_rows

from cc_ds.config import CCConfig, Config, DataConfig, ModelConfig, TrainConfig
from cc_ds.connection.decision import gumbel_noise_at
from cc_ds.data.dealing import RowCost
from cc_ds.dist.group import Group
from cc_ds.feed import StepFeed

ROWS = 20
COST = RowCost(1.0, 1.0, 0.0, 0.0)


def _feed(rank: int = 0, ranks: int = 1, cc: dict | None = None, **train) -> StepFeed:
    rows = tokenised_rows(count=ROWS)
    for index in (4, 9, 14):
        rows[index] |= {name: rows[0][name] for name in ("english_input_ids", "english_anchor")}
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "output_dir": "unused"} | train
    config = Config(
        cc=CCConfig(**(cc or {})),
        model=ModelConfig(model_name_or_path="unused"),
        data=DataConfig(train_file=("unused",)),
        train=TrainConfig(**settings),
    )
    return StepFeed(Dataset.from_list(rows), Group(rank, ranks, torch.device("cpu")), config, 0, LAYERS, COST)


def _sources(step) -> list[str]:
    return sorted(step.sources, key=lambda source: int(source.split(":")[1]))


def test_ranks_together_read_the_steps_of_one_rank():
    alone = _feed(per_device_train_batch_size=8)
    two = [_feed(rank, 2) for rank in range(2)]
    for _ in range(5):
        steps = [next(feed) for feed in two]
        whole = next(alone)
        assert sorted(steps[0].sources + steps[1].sources) == sorted(whole.sources)
        assert steps[0].labels + steps[1].labels == whole.labels
    assert alone.state_dict() == two[0].state_dict() == two[1].state_dict()


def test_every_rank_knows_the_labels_of_the_fullest():
    feeds = [_feed(rank, 2) for rank in range(2)]
    for _ in range(5):
        for at_once in zip(*(next(feed).micro_batches for feed in feeds), strict=True):
            counts = [len(batch.labels) for batch, _ in at_once]
            most = [batch.most_labels for batch, _ in at_once]
            assert most[0] == most[1] >= max(counts)


def test_noise_belongs_to_the_row():
    for feed in (_feed(), _feed(per_device_train_batch_size=8, gradient_accumulation_steps=1)):
        position = {feed.stream.dataset[feed.stream.index_at(p)]["source"]: p for p in range(8)}
        for batch, noise in next(feed).micro_batches:
            if batch.connected.all():
                rows = [position[batch.sources[row]] for row in batch.connected_rows.tolist()]
                assert torch.equal(noise, gumbel_noise_at(rows, LAYERS, 42))


def test_a_prompt_that_several_rows_share_is_read_once():
    feed = _feed(per_device_train_batch_size=10)  # every row in one step
    step = next(feed)
    prompts = [tuple(row["english_input_ids"]) for row in feed.stream.dataset if row["english_input_ids"]]
    assert len(step.english.lengths) == len(set(prompts)) < len(prompts)
    assert step.english_tokens == sum(map(len, set(prompts)))
    assert all(batch.english is None for batch, _ in step.micro_batches)


def test_plain_sft_reads_no_english():
    plain = next(_feed(method="sft"))
    assert plain.english is None and plain.english_tokens == 0
    assert all(noise is None and batch.english is None for batch, noise in plain.micro_batches)


def test_the_state_counts_steps_used_not_steps_prepared():
    feed = _feed()
    first = next(feed)
    state = feed.state_dict()
    assert state["position"] == 8
    second, third = next(feed), next(feed)
    again = _feed()
    next(again), next(again)  # a step is prepared ahead; the state that is loaded must discard it
    again.load_state_dict(state)
    assert _sources(next(again)) == _sources(second) != _sources(first)
    assert _sources(next(again)) == _sources(third)


def test_english_left_out_at_random_is_the_same_on_every_rank():
    def count(feeds, steps: int = 10) -> int:
        return sum(int(b.connected.sum()) for _ in range(steps) for f in feeds for b, _ in next(f).micro_batches)

    dropout = {"english_dropout": 0.5}
    half = count([_feed(per_device_train_batch_size=8, cc=dropout)])
    assert half == count([_feed(rank, 2, cc=dropout) for rank in range(2)])
    assert 0.3 < half / count([_feed(per_device_train_batch_size=8)]) < 0.7


def test_a_row_connected_as_at_inference_reads_its_own_prompt():
    feed = _feed(cc={"transform_share": 0.5})
    rows = {row["source"]: row for row in feed.stream.dataset}
    seen = {True: 0, False: 0}
    for _ in range(6):
        step = next(feed)
        prompts = step.english.input_ids[0].split(step.english.lengths)
        for batch, _ in step.micro_batches:
            order = torch.arange(len(prompts))[batch.english_of].tolist()
            columns = (batch.connected_rows.tolist(), order, batch.connected.tolist(), batch.own.tolist())
            for index, number, real, own in zip(*columns, strict=True):
                if real:
                    row = rows[batch.sources[index]]
                    expected = row["input_ids"][: row["anchor"] + 1] if own else row["english_input_ids"]
                    assert prompts[number].tolist() == expected
                    seen[own] += 1
    assert 0.3 < seen[True] / sum(seen.values()) < 0.7


def test_a_row_longer_than_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch is 9, but a row has 1[0-9] tokens"):
        _feed(max_tokens_per_micro_batch=9)
    step = next(_feed(max_tokens_per_micro_batch=16))
    assert all(sum(batch.target.lengths) <= 16 for batch, _ in step.micro_batches)
