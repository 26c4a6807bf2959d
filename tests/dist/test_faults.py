"""The fault table on one machine: how a run of two ranks ends, what is kept, and that the resumed run ends as if
nothing had happened. What a cluster adds (nodes, time limits, requeue) is in tests/slurm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import REPOSITORY, config_option, read_metrics

pytestmark = pytest.mark.slow
STEPS = 24


@dataclass
class Ended:
    """How a run ended."""

    code: int
    seconds: float
    """Since the fault struck; without one, since the start."""
    text: str


class Run:
    """Two ranks over one output_dir, started as often as needed."""

    def __init__(self, command: list[str], output_dir: Path) -> None:
        self.command, self.output_dir = command, output_dir
        self.stamp = output_dir.with_name(output_dir.name + ".stamp")

    def start(self, fault: str = "none", *options: str) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = [*self.command, "--output_dir", str(self.output_dir), "--resume_from_checkpoint", "latest"]
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "2", "CUDA_VISIBLE_DEVICES": "",
            "FAULT_STAMP": str(self.stamp),
        }  # fmt: skip
        return subprocess.Popen(
            [*launcher, "tests/dist/faulty.py", fault, *arguments, *options],
            cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def to_end(self, fault: str = "none", *options: str) -> Ended:
        self.stamp.unlink(missing_ok=True)
        begin = time.time()
        process = self.start(fault, *options)
        try:
            text, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            text, _ = process.communicate(timeout=60)
            pytest.fail(f"did not end: {text[-9000:]}")
        begin = self.stamp.stat().st_mtime if self.stamp.exists() else begin
        ended = Ended(process.returncode, time.time() - begin, text)
        print(f"SEEN {fault}: code {ended.code}, {ended.seconds:.0f} s, kept {self.kept()}, {self.state()['state']}")
        return ended

    def kept(self) -> list[int]:
        return sorted(int(path.name[11:]) for path in self.output_dir.glob("checkpoint-??????"))

    def state(self) -> dict:
        return json.loads((self.output_dir / "run_state.json").read_text(encoding="utf-8"))

    def log(self, rank: int) -> str:
        return (self.output_dir / f"logs/rank{rank}.log").read_text(encoding="utf-8")

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output_dir / "model.safetensors") | load_file(
            self.output_dir / "cc_connection.safetensors"
        )


@pytest.fixture(scope="module")
def command(base_settings, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("faults")
    zero3 = folder / "zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    ours = {"deepspeed": str(zero3), "max_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": 8,
            "gradient_accumulation_steps": 2}  # fmt: skip
    return config_option(base_settings | ours, folder)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> dict[str, torch.Tensor]:
    run = Run(command, tmp_path_factory.mktemp("undisturbed") / "run")
    assert run.to_end().code == 0 and run.state()["state"] == "finished"
    return run.weights()


@pytest.fixture
def run(command, tmp_path) -> Run:
    return Run(command, tmp_path / "run")


def goes_on_as_if_nothing_had_happened(run: Run, undisturbed: dict[str, torch.Tensor], from_step: int) -> None:
    ended = run.to_end()
    assert ended.code == 0, ended.text[-9000:]
    assert re.findall(r"resumed from \S+ at step (\d+)/", run.log(0))[-1:] == [str(from_step)]
    weights = run.weights()
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def test_one_misfortune_after_another(run, undisturbed):
    """A rank is killed in a step, one while it writes its part of a checkpoint, one hangs; then the run ends well."""
    ended = run.to_end("kill@11:1")
    assert ended.code != 0 and ended.seconds < 60
    assert run.kept() == [8] and run.state()["state"] == "running"

    ended = run.to_end("kill_save@16:1")
    assert ended.code != 0 and ended.seconds < 60
    assert run.kept() == [8] and (run.output_dir / "checkpoint-000016.partial-2").exists()

    ended = run.to_end("hang@11:1", "--step_timeout", "8")
    assert ended.code != 0 and ended.seconds < 60
    assert re.search(r"exitcode\s*: 124", ended.text), ended.text[-3000:]
    assert "watched_next" in run.log(1) and "no step for 8 seconds after step 10" in run.log(0)

    goes_on_as_if_nothing_had_happened(run, undisturbed, from_step=8)
    assert not list(run.output_dir.glob("*.partial-*"))


def test_usr1(run, undisturbed):
    process = run.start()
    wait(process, lambda: len(read_metrics(run.output_dir)) >= 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)  # one rank; the other hears it from there
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text[-9000:]
    state = run.state()
    assert state["state"] == "preempted" and state["step"] in run.kept()
    goes_on_as_if_nothing_had_happened(run, undisturbed, from_step=state["step"])


def test_term_during_an_evaluation(run, undisturbed, rows_file):
    evaluate = ["--eval_steps", "11", "--validation_file", str(rows_file), "--per_device_eval_batch_size", "1"]
    ended = run.to_end("term_eval@11:1", *evaluate)
    assert ended.code == 0, ended.text[-9000:]
    assert run.state()["state"] == "terminated" and run.kept() == [8, 11]
    assert all("step 11/24  not evaluated: asked to end" in run.log(rank) for rank in (0, 1))
    goes_on_as_if_nothing_had_happened(run, undisturbed, from_step=11)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_nan_step_is_skipped_on_every_rank(run, stage, tmp_path):
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    ended = run.to_end("nan@5:1", "--max_steps", "8", "--deepspeed", str(config), "--save_steps", "0")
    assert ended.code == 0, ended.text[-9000:]
    assert all("step 5 skipped: the loss of rank 1 is not finite" in run.log(rank) for rank in (0, 1))
    skipped = json.loads((run.output_dir / "skipped_steps.json").read_text())
    assert [rank["loss"] == "nan" for rank in skipped[0]["ranks"]] == [False, True]
    assert len(skipped[0]["ranks"][1]["rows"]) == 4
    assert [line["skipped_steps"] for line in read_metrics(run.output_dir)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(weight.isfinite().all() for weight in run.weights().values())


def test_nan_for_good_ends_the_run(run, undisturbed):
    ended = run.to_end("nan_on@10:1", "--max_skipped_steps", "3")
    assert ended.code != 0
    assert "error: 3 steps in a row were skipped, up to step 12" in ended.text
    assert run.kept() == [8] and run.state()["state"] == "error"
    goes_on_as_if_nothing_had_happened(run, undisturbed, from_step=8)


def test_a_corrupt_file_in_the_data(run, undisturbed, rows_file, tmp_path):
    """Torn between two starts of a run, and mended."""
    mine = ["--train_file", str(tmp_path / "rows.jsonl"), "--on_bad_row", "error"]
    shutil.copy(rows_file, tmp_path / "rows.jsonl")
    run.command = [*run.command, *mine]
    assert run.to_end("none", "--stop_after_steps", "8").code == 0
    lines = rows_file.read_text(encoding="utf-8").splitlines()
    torn = "\n".join([*lines[:12], lines[12][:20], *lines[13:]]) + "\n"
    (tmp_path / "rows.jsonl").write_text(torn, encoding="utf-8")
    ended = run.to_end()
    assert ended.code != 0 and "rows.jsonl, line 13, column 21: broken JSON" in ended.text
    assert run.kept() == [8] and run.state()["state"] == "error"
    shutil.copy(rows_file, tmp_path / "rows.jsonl")
    goes_on_as_if_nothing_had_happened(run, undisturbed, from_step=8)


def test_damaged_shards(run, undisturbed):
    """The newest checkpoint truncated, the one before with a bit flipped: the third is taken, the others are kept."""
    run.to_end("kill@20:0", "--save_steps", "6", "--save_total_limit", "3")
    assert run.kept() == [6, 12, 18]
    shards = [next((run.output_dir / f"checkpoint-{n:06d}/engine").glob("*optim_states.pt")) for n in (12, 18)]
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:1000])
    goes_on_as_if_nothing_had_happened(run, undisturbed, from_step=6)
    assert f"checkpoint-000018: damaged: engine/{shards[1].name} has 1000 bytes" in run.log(0)
    assert f"checkpoint-000012: damaged: engine/{shards[0].name} is not what was written" in run.log(0)
    assert len(list(run.output_dir.glob("checkpoint-*.damaged-1"))) == 2


def test_files_that_ask(run):
    process = run.start("none", "--max_steps", "100000", "--save_steps", "0")
    try:
        wait(process, lambda: run.state()["state"] == "running" and len(read_metrics(run.output_dir)) > 3)
        (run.output_dir / "save_now").touch()
        wait(process, lambda: len(run.kept()) == 1)
        (run.output_dir / "stop_now").touch()
        text, _ = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 0, text[-3000:]
    assert run.state()["state"] == "stopped" and run.state()["step"] == run.kept()[-1] and len(run.kept()) == 2


def wait(process: subprocess.Popen, holds) -> None:
    """Until something holds, while the process runs."""
    end = time.monotonic() + 120
    while True:
        with contextlib.suppress(FileNotFoundError):  # of what is still to be written
            if holds():
                return
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, too small for a second checkpoint."""
    if os.geteuid() != 0:
        pytest.skip("a small disk needs root (mount)")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(command, undisturbed, small_disk, tmp_path):
    run = Run(command, small_disk / "run")
    free = shutil.disk_usage(small_disk).free
    ballast = small_disk / "ballast"
    first = run.to_end("none", "--stop_after_steps", "8")
    assert first.code == 0, first.text[-3000:]
    used = free - shutil.disk_usage(small_disk).free
    ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - used // 2))
    ended = run.to_end()
    assert ended.code != 0
    assert re.search(
        r"error: checkpoint not written: .*checkpoint-000016.partial-2\S+: No space left on device; free", ended.text
    )
    assert run.kept() == [8] and run.state()["state"] == "error"
    ballast.unlink()
    shutil.move(run.output_dir, tmp_path / "roomier")
    goes_on_as_if_nothing_had_happened(Run(command, tmp_path / "roomier"), undisturbed, from_step=8)
