"""A SLURM cluster of two nodes on this machine, for the shipped job scripts; skipped, with the reason, where it can't.

The scripts run as they are, but for sizes: one task per node, no GPU, a tiny model. The health check, some seconds of
each start, is left to the tests that are about it. See cluster/up.sh.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.conftest import REPOSITORY, model_folder, read_metrics, rows_file  # noqa: F401

CLUSTER = Path(__file__).parent / "cluster"
SIZES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30"]


def pytest_collection_modifyitems(items) -> None:
    """All of these are marked slurm; `make test-slurm` runs them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@dataclass
class Job:
    """A submitted job."""

    number: str
    output_dir: Path
    log: Path
    started: float

    def show(self) -> dict[str, str]:
        """What scontrol says of it."""
        text = _run("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def said(self) -> str:
        """The job's own output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 240) -> float:
        """Wait for something; returns the seconds it took. A job that has ended meanwhile ends the wait too."""
        begin = time.monotonic()
        while not holds():
            state = self.show()["JobState"]
            if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") and not holds():
                pytest.fail(f"the job is {state} before {what}\n{self.everything()}")
            if time.monotonic() - begin > seconds:
                pytest.fail(f"{what}: not within {seconds} s; the job is {state}\n{self.everything()}")
            time.sleep(0.25)
        return time.monotonic() - begin

    def until_checkpoint(self, step: int) -> None:
        """Wait for a checkpoint at this step or a later one."""
        names = self.output_dir.glob
        self.until(lambda: any(int(p.name[11:]) >= step for p in names("checkpoint-??????")), f"checkpoint {step}")

    def end(self, seconds: float = 300) -> dict[str, str]:
        """Wait for the end; what scontrol says then."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.show()["JobState"] in over, "the end", seconds)
        return self.show()

    def everything(self) -> str:
        """All output, for a failing test."""
        texts = [self.said()]
        for path in sorted(self.output_dir.glob("logs/**/*.log")):
            texts.append(f"--- {path}\n{path.read_text(encoding='utf-8', errors='replace')[-1500:]}")
        return "\n".join(texts)[-15000:]

    def state(self) -> dict:
        """run_state.json."""
        return json.loads((self.output_dir / "run_state.json").read_text(encoding="utf-8"))


class Cluster:
    """Two nodes, n1 and n2."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def submit(self, script: str, output_dir: Path, *arguments: str, options: tuple[str, ...] = (), **variables) -> Job:
        """sbatch one of the shipped scripts."""
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        log = output_dir.with_suffix(".out")
        environment = os.environ | self.environment | {"OUTPUT_DIR": str(output_dir), **variables}
        command = ["sbatch", "--parsable", *SIZES, f"--output={log}", *options, script, *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip(), output_dir, log, time.monotonic())

    def ranks(self, node: str) -> list[int]:
        """Process ids of the training ranks on a node."""
        namespace = os.readlink(f"/proc/{self._first_process(node)}/ns/uts")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                same = os.readlink(entry / "ns/uts") == namespace
            except OSError:
                continue
            if same and b"cc_ds/train.py" in words and b"python" in os.path.basename(words[0]):
                found.append(int(entry.name))
        return found

    def power_off(self, node: str) -> None:
        """kill -9 of the node's first process, which takes every other with it."""
        os.kill(int((self.folder / "pid" / f"node.{node}").read_text()), signal.SIGKILL)

    def power_on(self, node: str) -> None:
        """Boot it again."""
        subprocess.run([str(CLUSTER / "node.sh"), str(self.folder), node], check=True)

    def link(self, node: str, state: str) -> None:
        """Cut a node off the network ("down"), or reconnect it ("up")."""
        _run("ip", "link", "set", f"ccs{node[1:]}", state)

    def until_idle(self, seconds: float = 90) -> None:
        """Wait for both nodes to be free and well."""
        end = time.monotonic() + seconds
        while _run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != "2":
            assert time.monotonic() < end, _run("sinfo", "-N", "-l")
            time.sleep(0.5)

    def _first_process(self, node: str) -> int:
        parent = int((self.folder / "pid" / f"node.{node}").read_text())
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(children[0])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The cluster, up for the session."""
    reason = _why_not()
    if reason:
        pytest.skip(reason)
    folder = Path("/tmp") / f"ccs-{os.getpid()}"  # a short path: sockets lie in it
    booted = subprocess.run([str(CLUSTER / "up.sh"), str(folder)], capture_output=True, text=True, check=False)
    try:
        assert booted.returncode == 0, booted.stdout + booted.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield Cluster(
            folder,
            {
                "EXPECT_GPUS": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
                "DEEPSPEED_TIMEOUT": "2", "HEALTH_CHECK": "0", "LOOK_EVERY": "2",
            },
        )  # fmt: skip
    finally:
        for job in _run("squeue", "-h", "-o", "%i").split():
            _run("scancel", job)
        subprocess.run([str(CLUSTER / "down.sh"), str(folder)], check=False)
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def settings(model_folder, rows_file, tmp_path_factory) -> dict[str, str]:  # noqa: F811
    """Variables of a small training: 60 steps, a checkpoint every 10."""
    config = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    zero = config.with_name("zero3.json")
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    values = {
        "model_name_or_path": str(model_folder), "train_file": str(rows_file), "chat_template": "plain",
        "output_dir": "unused", "data_cache_dir": str(config.with_name("cache")), "learning_rate": 1e-3,
        "max_length": 32, "max_english_length": 32, "per_device_train_batch_size": 2, "max_steps": 60,
        "save_steps": 10, "logging_steps": 2, "deepspeed": str(zero), "step_timeout": 60,
    }  # fmt: skip
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    return {"CONFIG": str(config)}


@pytest.fixture(scope="session")
def undisturbed(cluster, settings, tmp_path_factory) -> Job:
    """The job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    job = cluster.submit("slurm/train_70b.sh", folder, **settings, HEALTH_CHECK="1")
    job.end()
    return job


def same_weights(first: Job, second: Job) -> bool:
    """Whether two runs ended with the same model, bit for bit."""
    one, two = _weights(first), _weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _weights(job: Job) -> dict[str, torch.Tensor]:
    folder = job.output_dir
    return load_file(folder / "model.safetensors") | load_file(folder / "cc_connection.safetensors")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "a test cluster needs root (network namespaces, slurmd)"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; make test-slurm installs slurm-wlm, munge and iproute2"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else None
