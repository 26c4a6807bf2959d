"""The shipped training script on two nodes: undisturbed, and through everything that a cluster does to a job.

After every fault, the job that went on by itself ends with the weights of the one that was never disturbed.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from .conftest import read_metrics, same_weights

SCRIPT = "slurm/train_70b.sh"


@pytest.fixture(autouse=True)
def both_nodes(cluster):
    """Every test begins with both nodes up and free."""
    cluster.until_idle()


def test_undisturbed(undisturbed):
    shown = undisturbed.show()
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), undisturbed.everything()
    assert undisturbed.state()["state"] == "finished"
    said = undisturbed.said()
    assert "meeting at n1:" in said
    logs = {path.name for path in (undisturbed.output_dir / "logs" / f"job-{undisturbed.number}.0").iterdir()}
    assert logs == {"health.log", "rank0-n1.log", "rank1-n2.log"}
    kept = [path.name for path in undisturbed.output_dir.glob("checkpoint-*")]
    assert sorted(kept) == ["checkpoint-000140", "checkpoint-000160"]
    assert (undisturbed.output_dir / "model.safetensors").exists()


def test_usr1_requeues_and_goes_on(cluster, settings, undisturbed, tmp_path):
    """As --signal=B:USR1@N sends it before the time limit: to the batch shell."""
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings)
    job.until(lambda: len(read(job)) >= 6, "30 steps")
    os.system(f"scancel --batch --signal=USR1 {job.number}")
    seconds = job.until(lambda: "requeueing" in job.said(), "its requeue")
    job.until(lambda: job.show()["Restarts"] == "1", "a restart")
    print(f"SEEN USR1: requeued after {seconds:.1f} s")
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), job.everything()
    assert "USR1: asking the ranks to save and end" in job.said() and "requeueing" in job.said()
    assert "resumed from" in (job.output_dir / "logs/rank0.log").read_text()
    assert same_weights(job, undisturbed)


def test_a_time_limit(cluster, settings, tmp_path):
    """USR1 as SLURM itself sends it, early enough to save; the next start goes on from there."""
    job = cluster.submit(
        SCRIPT, tmp_path / "run", *settings, "--max_steps", "100000", "--save_steps", "0",
        options=("--time=00:03:00", "--signal=B:USR1@60"),
    )  # fmt: skip
    job.until(lambda: job.show()["Restarts"] == "1", "a restart", 240)
    saved = job.state()["step"]
    assert (job.output_dir / f"checkpoint-{saved:06d}/complete.json").exists() and "requeueing" in job.said()
    job.until(lambda: f"at step {saved}/100000" in (job.output_dir / "logs/rank0.log").read_text(), "its resumption")
    (job.output_dir / "stop_now").touch()
    assert job.end()["JobState"] == "COMPLETED", job.everything()
    assert job.state()["state"] == "stopped"
    print("SEEN time limit:", [line for line in job.said().splitlines() if line.startswith("20")])


def test_a_killed_rank(cluster, settings, undisturbed, tmp_path):
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings)
    job.until_checkpoint(40)
    os.kill(cluster.ranks("n2")[0], signal.SIGKILL)
    seconds = job.until(lambda: "the ranks ended with code" in job.said(), "the end of the ranks", 60)
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), job.everything()
    assert "crash 1 after checkpoint-" in job.said() and seconds < 60
    print(f"SEEN killed rank: ranks ended after {seconds:.1f} s", [x for x in job.said().splitlines() if "code" in x])
    assert same_weights(job, undisturbed)


def test_power_loss(cluster, settings, undisturbed, tmp_path):
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings)
    job.until_checkpoint(40)
    cluster.power_off("n2")
    time.sleep(1)
    seconds = job.until(lambda: job.show()["Restarts"] == "1", "a restart", 120)
    cluster.power_on("n2")
    shown = job.end()
    assert shown["JobState"] == "COMPLETED", job.everything()
    assert same_weights(job, undisturbed)
    print(f"SEEN power loss: requeued after {seconds:.0f} s, {job.show()['Restarts']} restarts")


def test_a_partition(cluster, settings, undisturbed, tmp_path):
    """The node of rank 0 is cut off, and comes back when the job has been requeued: its old rank may still run."""
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings)
    job.until_checkpoint(40)
    cluster.link("n1", "down")
    try:
        seconds = job.until(lambda: job.show()["Restarts"] == "1", "a restart", 120)
    finally:
        cluster.link("n1", "up")
    assert job.end(400)["JobState"] == "COMPLETED", job.everything()
    assert same_weights(job, undisturbed)
    print(f"SEEN partition: requeued after {seconds:.0f} s, {job.show()['Restarts']} restarts")


def test_scancel(cluster, settings, undisturbed, tmp_path):
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings)
    job.until(lambda: len(read(job)) >= 5, "25 steps")
    begin = time.monotonic()
    os.system(f"scancel {job.number}")
    job.end()
    assert job.show()["JobState"] == "CANCELLED"
    while job.state()["state"] != "terminated" and time.monotonic() < begin + 30:
        time.sleep(0.5)
    assert job.state()["state"] == "terminated", job.everything()
    print(f"SEEN scancel: ended after {time.monotonic() - begin:.1f} s")
    saved = job.state()["step"]
    assert (job.output_dir / f"checkpoint-{saved:06d}/complete.json").exists()
    cluster.until_idle()
    again = cluster.submit(SCRIPT, tmp_path / "run", *settings)
    assert again.end()["JobState"] == "COMPLETED", again.everything()
    assert same_weights(again, undisturbed)


def test_a_mistake_is_not_requeued(cluster, settings, tmp_path):
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings, "--train_file", "nowhere.jsonl")
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0"), job.everything()
    assert "not requeued" in job.said() and "nowhere.jsonl" in job.said()


def test_crashes_without_progress_end(cluster, settings, tmp_path):
    """A rank that dies before the first checkpoint, twice."""
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings)
    for restart in ("0", "1"):
        job.until(lambda r=restart: job.show()["Restarts"] == r and bool(cluster.ranks("n2")), f"start {restart}")
        os.kill(cluster.ranks("n2")[0], signal.SIGKILL)
        job.until(lambda r=restart: f"crash {int(r) + 1} after no checkpoint" in job.said(), "the crash")
    assert job.end()["JobState"] == "FAILED"
    assert "2 crashes without a new checkpoint in between: not requeued" in job.said()


def test_a_bad_node_is_named(cluster, settings, tmp_path):
    job = cluster.submit(SCRIPT, tmp_path / "run", *settings, MIN_MEMORY_GIB="100000")
    assert job.end()["ExitCode"] == "3:0"
    assert "health check: node n2 (task 1): BAD" in job.said()


def read(job) -> list[dict]:
    """The metrics so far."""
    return read_metrics(job.output_dir) if (job.output_dir / "metrics.jsonl").exists() else []
