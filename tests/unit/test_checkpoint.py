"""Checkpoints are whole or they are not used: damage of every kind, a full disk, a stale writer, what is kept."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pytest
import torch

from cc_ds.checkpoint import (
    damage,
    digest_damage,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
    set_aside_later,
)
from cc_ds.dist.group import Group
from cc_ds.dist.writer import CheckpointWriter
from cc_ds.run_state import RunState, StaleRunError

ALONE = Group.alone()


class Engine:
    """As much of DeepSpeed's engine as a checkpoint needs."""

    def __init__(self) -> None:
        self.checkpoint_engine = CheckpointWriter()

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        for rank in range(2):
            self.checkpoint_engine.save({"weight": torch.arange(1000) + rank}, f"{folder}/{tag}/rank{rank}.pt")
        Path(folder, tag, "plain.txt").write_text("not written through the writer")


@pytest.fixture
def run(tmp_path) -> RunState:
    return RunState(tmp_path / "out", ALONE)


@pytest.fixture(autouse=True)
def our_log(monkeypatch):
    monkeypatch.setattr(logging.getLogger("cc_ds"), "propagate", True)


def save(run: RunState, step: int, engine=None, **options) -> Path:
    return save_checkpoint(engine or Engine(), ALONE, run, {"step": step}, **{"keep": 2, **options})


def names(run: RunState) -> list[str]:
    return [path.name for path in list_checkpoints(run.output_dir)]


def test_a_whole_one_is_found_and_reads_back(run):
    path = save(run, 7)
    assert damage(path) is None and digest_damage(path) is None
    assert find_checkpoint("latest", run.output_dir, digests=True) == path
    marker = json.loads((path / "complete.json").read_text())
    assert set(marker["files"]) == {"engine/rank0.pt", "engine/rank1.pt", "engine/plain.txt", "trainer_state.json"}
    assert torch.equal(torch.load(path / "engine/rank1.pt")["weight"], torch.arange(1000) + 1)


def truncate(path: Path) -> str:
    file = path / "engine/rank1.pt"
    file.write_bytes(file.read_bytes()[:100])
    return "damaged: engine/rank1.pt has 100 bytes, not the"


def flip_a_bit(path: Path) -> str:
    file = path / "engine/rank0.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    return r"damaged: engine/rank0.pt is not what was written \(its SHA-256 differs\)"


def lose_a_shard(path: Path) -> str:
    (path / "engine/rank1.pt").unlink()
    return r"not a whole checkpoint \(no engine/rank1.pt\)"


def lose_the_marker(path: Path) -> str:
    (path / "complete.json").unlink()
    return r"not a whole checkpoint \(no complete.json\)"


def break_the_marker(path: Path) -> str:
    (path / "complete.json").write_text('{"files": [1')
    return "damaged: complete.json can't be read"


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, lose_a_shard, lose_the_marker, break_the_marker])
def test_damage_is_named_and_the_older_one_taken(run, harm, caplog):
    older, newest = save(run, 5), save(run, 10)
    message = harm(newest)
    with pytest.raises(ValueError, match=f"checkpoint-000010: {message}.*; whole ones in .*checkpoint-000005"):
        find_checkpoint(str(newest), run.output_dir, digests=True)
    before = sorted(path.relative_to(newest) for path in newest.rglob("*"))
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint("latest", run.output_dir, digests=True) == older
    aside = run.output_dir / "checkpoint-000010.damaged-1"
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == before and not newest.exists()
    assert "checkpoint-000010" in caplog.text and "skipped" in caplog.text


def test_sizes_alone_do_not_see_a_flipped_bit(run):
    path = save(run, 5)
    flip_a_bit(path)
    assert find_checkpoint("latest", run.output_dir, digests=False) == path


def test_damaged_ones_alone_are_no_reason_to_start_anew(run):
    truncate(save(run, 5))
    for _ in range(2):  # and still so at the next start
        with pytest.raises(ValueError, match=r"no whole checkpoint in .*checkpoint-000005: damaged"):
            find_checkpoint("latest", run.output_dir)


def test_a_damaged_one_is_moved_aside_not_deleted(run):
    truncate(save(run, 5))
    save(run, 5)
    assert find_checkpoint("latest", run.output_dir, digests=True).name == "checkpoint-000005"
    assert (run.output_dir / "checkpoint-000005.damaged-1/engine/rank1.pt").stat().st_size == 100


def test_those_of_another_course_are_set_aside(run, caplog):
    for step in (5, 10, 15):
        save(run, step, keep=9)
    set_aside_later(run.output_dir, 5)
    assert names(run) == ["checkpoint-000005"]
    assert len(list(run.output_dir.glob("checkpoint-*.superseded-1"))) == 2
    assert "this run begins at step 5" in caplog.text
    save(run, 6, keep=1)
    assert find_checkpoint("latest", run.output_dir) == run.output_dir / "checkpoint-000006"


def test_newest_and_every_kth_are_kept_and_damaged_ones_do_not_count(run):
    for step in (2, 4, 6, 8):
        save(run, step, keep_every=4)
    truncate(run.output_dir / "checkpoint-000008")
    save(run, 10, keep_every=4)
    assert names(run) == ["checkpoint-000004", "checkpoint-000006", "checkpoint-000008", "checkpoint-000010"]
    save(run, 12, keep_every=4)
    assert names(run) == ["checkpoint-000004", "checkpoint-000008", "checkpoint-000010", "checkpoint-000012"]


class FullDisk(Engine):
    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        super().save_checkpoint(folder, tag, save_latest)
        Path(folder, tag, "rank9.pt").symlink_to("/dev/full")
        self.checkpoint_engine.save({"weight": torch.zeros(100_000)}, f"{folder}/{tag}/rank9.pt")
        self.checkpoint_engine.save({"weight": torch.zeros(10)}, f"{folder}/{tag}/rank10.pt")


def test_a_full_disk_is_one_error_and_leaves_the_older_ones(run):
    older = save(run, 5)
    with pytest.raises(ValueError, match=r"rank 0: .*rank9.pt: No space left on device; free space there or choose"):
        save(run, 10, FullDisk())
    assert find_checkpoint("latest", run.output_dir, digests=True) == older
    assert [path.name for path in run.output_dir.glob("checkpoint-*")] == ["checkpoint-000005"]


def test_a_disk_that_fills_at_the_last_file(run, monkeypatch):
    older = save(run, 5)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(ValueError, match=r"model No space left on device; free space there"):
        save(run, 10, describe=full)
    assert find_checkpoint("latest", run.output_dir, digests=True) == older


def test_a_stale_writer_stops(run):
    older = save(run, 5)
    newer = RunState(run.output_dir, ALONE)
    with pytest.raises(StaleRunError, match=r"taken over by a newer start \(generation 2"):
        save(run, 10)
    assert names(run) == [older.name]
    assert save(newer, 10).name == "checkpoint-000010"


def test_a_writer_that_turns_stale_while_it_writes_does_not_count(run):
    class Slow(Engine):
        def save_checkpoint(self, *arguments, **options):
            super().save_checkpoint(*arguments, **options)
            RunState(run.output_dir, ALONE)

    with pytest.raises(StaleRunError):
        save(run, 10, Slow())
    assert names(run) == []


def test_what_an_older_start_left_is_removed_and_said(run, caplog):
    left = run.output_dir / "checkpoint-000004.partial-1"
    left.mkdir()
    with caplog.at_level(logging.INFO):
        save(RunState(run.output_dir, ALONE), 6)
    assert not left.exists()
    assert f"removing {left}, which was never completed by generation 1" in caplog.text
