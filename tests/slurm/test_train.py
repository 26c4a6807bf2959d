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
    assert sorted(kept) == ["checkpoint-000050", "checkpoint-000060"]
    assert (undisturbed.output_dir / "model.safetensors").exists()


def test_usr1_before_the_first_step(cluster, settings, undisturbed, tmp_path):
    """As --signal=B:USR1@N sends it, to the batch shell: in the health check, and while the ranks start. Each time the
    job is requeued, and no start counts as a crash. In the middle of the training: test_a_time_limit."""
    job = cluster.submit(SCRIPT, tmp_path / "run", **settings, HEALTH_CHECK="1")

    def ask(restart: int) -> None:
        os.system(f"scancel --batch --signal=USR1 {job.number}")
        seconds = job.until(lambda: job.said().count("requeueing") == restart, "its requeue")
        print(f"SEEN USR1 {restart}: requeued after {seconds:.1f} s")
        job.until(lambda: job.show()["Restarts"] == str(restart), "a restart")

    job.until(lambda: "meeting at" in job.said(), "the first start")
    ask(1)
    assert "USR1 before the ranks started" in job.said() and not (job.output_dir / "run_state.json").exists()

    job.until(lambda: bool(cluster.ranks("n1")) and bool(cluster.ranks("n2")), "ranks that start")
    assert not (job.output_dir / "run_state.json").exists()
    ask(2)
    early = job.state()
    assert early["state"] == "preempted" and early["step"] <= 5, early
    assert (job.output_dir / f"checkpoint-{early['step']:06d}/complete.json").exists()

    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "2"), job.everything()
    assert job.said().count("USR1: asking the ranks to save and end") == 1 and "crash" not in job.said()
    assert "resumed from" in (job.output_dir / "logs/rank0.log").read_text()
    assert same_weights(job, undisturbed)


def test_a_time_limit(cluster, settings, undisturbed, tmp_path):
    """USR1 as SLURM itself sends it. The ranks are held until it comes, as the training is short."""
    limits = ("--time=00:02:00", "--signal=B:USR1@60")
    job = cluster.submit(SCRIPT, tmp_path / "run", **settings, options=limits)
    job.until(lambda: len(read(job)) >= 5, "10 steps")
    held = cluster.ranks("n1") + cluster.ranks("n2")
    for rank in held:
        os.kill(rank, signal.SIGSTOP)
    job.until(lambda: "USR1: asking the ranks to save and end" in job.said(), "USR1")
    left = time.mktime(time.strptime(job.show()["EndTime"], "%Y-%m-%dT%H:%M:%S")) - time.time()
    begin = time.monotonic()
    for rank in held:
        os.kill(rank, signal.SIGCONT)
    job.until(lambda: job.show()["Restarts"] == "1", "a restart")
    print(f"SEEN time limit: USR1 {left:.0f} s before it; requeued after {time.monotonic() - begin:.1f} s")
    saved = job.state()["step"]
    assert (job.output_dir / f"checkpoint-{saved:06d}/complete.json").exists()
    assert job.end()["JobState"] == "COMPLETED", job.everything()
    assert f"at step {saved}/60" in (job.output_dir / "logs/rank0.log").read_text()
    assert same_weights(job, undisturbed)


def test_a_killed_rank_then_scancel(cluster, settings, undisturbed, tmp_path):
    """The killed rank's job goes on by itself; the cancelled one does not, and goes on when it is submitted again."""
    job = cluster.submit(SCRIPT, tmp_path / "run", **settings)
    job.until_checkpoint(10)
    os.kill(cluster.ranks("n2")[0], signal.SIGKILL)
    seconds = job.until(lambda: "the ranks ended with code" in job.said(), "the end of the ranks", 60)
    assert seconds < 60
    print(f"SEEN killed rank: ranks ended after {seconds:.1f} s", [x for x in job.said().splitlines() if "code" in x])
    job.until(lambda: job.show()["Restarts"] == "1", "a restart")
    assert "crash 1 after checkpoint-" in job.said()

    job.until_checkpoint(30)
    begin = time.monotonic()
    os.system(f"scancel {job.number}")
    assert job.end()["JobState"] == "CANCELLED"
    while job.state()["state"] != "terminated" and time.monotonic() < begin + 30:
        time.sleep(0.25)
    assert job.state()["state"] == "terminated", job.everything()
    print(f"SEEN scancel: ended after {time.monotonic() - begin:.1f} s")
    saved = job.state()["step"]
    assert (job.output_dir / f"checkpoint-{saved:06d}/complete.json").exists()
    cluster.until_idle()
    again = cluster.submit(SCRIPT, tmp_path / "run", **settings)
    assert again.end()["JobState"] == "COMPLETED", again.everything()
    assert (job.output_dir / "logs/rank0.log").read_text().count("resumed from") == 2
    assert same_weights(again, undisturbed)


def test_power_loss_then_a_partition(cluster, settings, undisturbed, tmp_path):
    """One node is switched off. Later the node of rank 0 is cut off, and comes back when the job has been requeued: its
    old rank may still run."""
    job = cluster.submit(SCRIPT, tmp_path / "run", **settings)
    job.until_checkpoint(10)
    cluster.power_off("n2")
    seconds = job.until(lambda: job.show()["Restarts"] != "0", "a restart", 120)
    cluster.power_on("n2")
    print(f"SEEN power loss: requeued after {seconds:.0f} s")

    job.until_checkpoint(30)
    restarts = job.show()["Restarts"]
    print(f"SEEN power loss: {restarts} restarts")
    cluster.link("n1", "down")
    try:
        seconds = job.until(lambda: job.show()["Restarts"] != restarts, "a restart", 120)
    finally:
        cluster.link("n1", "up")
    assert job.end(400)["JobState"] == "COMPLETED", job.everything()
    print(f"SEEN partition: requeued after {seconds:.0f} s, {job.show()['Restarts']} restarts in all")
    assert same_weights(job, undisturbed)


def test_a_mistake_is_not_requeued(cluster, settings, tmp_path):
    job = cluster.submit(SCRIPT, tmp_path / "run", "--train_file", "nowhere.jsonl", **settings)
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0"), job.everything()
    assert "not requeued" in job.said() and "nowhere.jsonl" in job.said()


def test_crashes_without_progress_end(cluster, settings, tmp_path):
    """A rank that dies before the first checkpoint, twice."""
    job = cluster.submit(SCRIPT, tmp_path / "run", **settings)
    for restart in ("0", "1"):
        job.until(lambda r=restart: job.show()["Restarts"] == r and bool(cluster.ranks("n2")), f"start {restart}")
        os.kill(cluster.ranks("n2")[0], signal.SIGKILL)
        job.until(lambda r=restart: f"crash {int(r) + 1} after no checkpoint" in job.said(), "the crash")
    assert job.end()["JobState"] == "FAILED"
    assert "2 crashes without a new checkpoint in between: not requeued" in job.said()


def test_a_bad_node_is_named(cluster, settings, tmp_path):
    job = cluster.submit(SCRIPT, tmp_path / "run", **settings, HEALTH_CHECK="1", MIN_MEMORY_GIB="100000")
    assert job.end()["ExitCode"] == "3:0"
    assert "health check: node n2 (task 1): BAD" in job.said()


def read(job) -> list[dict]:
    """The metrics so far."""
    return read_metrics(job.output_dir) if (job.output_dir / "metrics.jsonl").exists() else []
