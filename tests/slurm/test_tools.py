"""The other shipped scripts, on what the training script left: fit the matrix, then evaluate with it."""

from __future__ import annotations

import json

ONE_NODE = ("--nodes=1", "--ntasks-per-node=1")


def test_fit_then_evaluate(cluster, undisturbed, rows_file, tmp_path):
    model, fitted = undisturbed.output_dir, tmp_path / "fitted"
    fit = cluster.submit(
        "slurm/fit_transform.sh", fitted, "--num_pairs", "8", "--held_out", "0.25", "--ridge", "0.1",
        "--deepspeed", "ds_configs/zero3.json", MODEL=str(model), DATA=str(rows_file),
    )  # fmt: skip
    assert fit.end()["JobState"] == "COMPLETED", fit.everything()
    assert "Saved the model with its transform" in fit.said()
    assert len(list(fitted.glob("logs/*/rank*.log"))) == 2 and not (tmp_path / "fitted.activations").exists()
    assert (fitted / "cc_connection.safetensors").exists() and (fitted / "transform_report.json").exists()
    scores = tmp_path / "scores"
    evaluation = cluster.submit(
        "slurm/evaluate.sh", scores, "--max_new_tokens", "4", "--limit", "4",
        options=ONE_NODE, MODEL=str(fitted), TASK="rows", DATA=str(rows_file),
    )  # fmt: skip
    assert evaluation.end()["JobState"] == "COMPLETED", evaluation.everything()
    assert json.loads((scores / "rows.json").read_text())["mode"] == "transform"


def test_a_mistake_is_the_jobs_exit_code(cluster, tmp_path):
    job = cluster.submit("slurm/evaluate.sh", tmp_path / "scores", options=ONE_NODE, MODEL=str(tmp_path / "nowhere"))
    assert job.end()["ExitCode"] == "2:0"
    assert "nowhere: no such model folder" in job.said()
