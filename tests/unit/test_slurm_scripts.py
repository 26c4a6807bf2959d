"""What the job scripts start, by an srun that is a loop over two ranks; tests/slurm has a real SLURM."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

SRUN = """#!/bin/bash
while [ "$1" != -- ]; do [[ $1 = --output=* ]] && log=${1#--output=}; shift; done
for rank in 0 1; do
    into=${log/\\%t/$rank}
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "${@:2}" >"${into/\\%N/n1}"
done
"""


def _run(script: str, folder: Path, *arguments: str, **variables: str) -> list[str]:
    """What each rank of a job is called with: rank, number of ranks, arguments."""
    programs = {"srun": SRUN, "scontrol": "#!/bin/sh\necho n1\n", "python": '#!/bin/sh\necho "$RANK/$WORLD_SIZE $*"\n'}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text, encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": f"{folder}/bin/python", "HEALTH_CHECK": "0",
        "LOOK_EVERY": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "OUTPUT_DIR": str(folder / "out"), **variables,
    }  # fmt: skip
    command = ["bash", str(REPOSITORY / "slurm" / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("out/logs/job-7.?/rank*.log"))]


def test_a_fit_reads_on_every_rank_and_may_partition_the_model(tmp_path):
    (tmp_path / "out.activations").mkdir()
    said = _run("fit_transform.sh", tmp_path, "--deepspeed", "ds_configs/zero3.json", MODEL="m", DATA="d")
    same = f"--activations {tmp_path}/out.activations --deepspeed ds_configs/zero3.json"
    assert said == [
        f"{rank}/2 tools/fit_transform.py --model m --data d --output {tmp_path}/out {same}" for rank in range(2)
    ]
    assert not (tmp_path / "out.activations").exists()


def test_activations_in_a_folder_of_ones_own_stay(tmp_path):
    (tmp_path / "own").mkdir()
    said = _run("fit_transform.sh", tmp_path, ACTIVATIONS=str(tmp_path / "own"))
    assert all(f"--activations {tmp_path}/own" in line for line in said)
    assert (tmp_path / "own").exists()


@pytest.mark.parametrize(("restarts", "begins_with"), [("0", "out/checkpoint-000005"), ("1", "latest")])
@pytest.mark.parametrize("script", ["train_8b.sh", "train_70b.sh"])
def test_a_named_checkpoint_is_for_the_first_start_alone(script, restarts, begins_with, tmp_path):
    (tmp_path / "out").mkdir()
    ended = f'{{"attempt": "7.{restarts}", "state": "finished"}}'
    (tmp_path / "out/run_state.json").write_text(ended, encoding="utf-8")
    said = _run(script, tmp_path, RESUME="out/checkpoint-000005", SLURM_RESTART_COUNT=restarts)
    assert len(said) == 2 and all(f"--resume_from_checkpoint {begins_with} " in line for line in said)


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "slurm").glob("[!c]*.sh")))
def test_one_rank_for_each_gpu(script):
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (REPOSITORY / "slurm" / script).read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
