"""What a killed run leaves behind, and what the next one takes from it."""

from __future__ import annotations

import json

import pytest

from cc_ds.dist.group import Group
from cc_ds.eval.journal import Answer, Journal, model_fingerprint

ALONE = Group.alone()
YES = Answer(text="yes\u2028\n", tokens_in=3, tokens_out=2, seconds=0.5)
NO = Answer(text="no", tokens_in=1, tokens_out=1, seconds=0.25)


def test_answers_come_back_from_every_rank_under_the_same_settings_alone(tmp_path):
    journal = Journal(tmp_path / "j", "model")
    assert journal.open({"mode": "plain"}, ALONE) == {}
    journal.add({"a": YES})
    second = Journal(tmp_path / "j", "model")
    assert second.open({"mode": "plain"}, Group(1, 1, ALONE.device)) == {"a": YES}
    second.add({"b": NO})
    assert {file.name for file in (tmp_path / "j").iterdir()} == {"rank-00000.jsonl", "rank-00001.jsonl"}
    assert Journal(tmp_path / "j", "model").open({"mode": "plain"}, ALONE) == {"a": YES, "b": NO}
    assert Journal(tmp_path / "j", "model").open({"mode": "english"}, ALONE) == {}
    assert Journal(tmp_path / "j", "another").open({"mode": "plain"}, ALONE) == {}


def test_a_torn_line_is_asked_again_and_does_not_spoil_the_next(tmp_path):
    journal = Journal(tmp_path, "model")
    journal.open({}, ALONE)
    journal.add({"a": YES, "b": NO})
    file = tmp_path / "rank-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    again = Journal(tmp_path, "model")
    assert again.open({}, ALONE) == {"a": YES}
    again.add({"b": NO})
    assert Journal(tmp_path, "model").open({}, ALONE) == {"a": YES, "b": NO}
    assert all(json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1])


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "rank-00000.jsonl").write_text('{"id": "a"\n{"id": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rank-00000.jsonl, line 1: not an answered row"):
        Journal(tmp_path, "model").open({}, ALONE)


def test_fingerprint_follows_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12")
    before = model_fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("no part of the model")
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert model_fingerprint(tmp_path) != before
    assert model_fingerprint("owner/model") != model_fingerprint("owner/other")
