"""What is missing is run, what is there is kept; the report's figures."""

import json
from pathlib import Path

import numpy as np
import pytest

from cc_ds.config import load_config
from cc_ds.data.batches import BatchStream
from experiments import report, run
from experiments.arms import ARMS, MODELS, TABLES, settings, train_options
from experiments.prepare_data import TARGETS


def result(shares: dict[str, str]) -> dict:
    """A measurement in which every language has these marks, by mode."""
    languages = (*TARGETS, "en", "fr")
    marks = {mode: dict.fromkeys(languages, text) for mode, text in shares.items()}
    given = {mode: {"yes": 3, "no": 1} for mode in shares}
    tasks = {task: {"correct": marks, "given": given} for task in ("sib200", "xnli", "xstorycloze")}
    training = {"lines": [{"loss": 9.0}]}
    fit = None
    if "matrix" in shares:
        end = {"gate_entropy": 0.5, "fusion_ratio": 2.0, "chosen_layers": {"sw": [1.0, 3.0], "yo": [5.0, 0.0]}}
        training["lines"].append(end)
        fit = {"identity": 0.5, "matrix": 0.25}
    return {"tasks": tasks, "fit": fit, "measure_cpu_seconds": 5.0, "training": training}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Scripts are not run but noted; what they would leave is left."""
    noted = []

    def python(script, *words, log_file=None, threads=None):
        words = list(map(str, words))
        noted.append((script, words))
        if script.endswith("prepare_data.py"):
            path = Path(words[words.index("--output") + 1], "train.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"instruction": "t", "instruction_en": "e", "output": "o", "lang": "sw"}\n')
        elif script.endswith("measure.py"):
            marks = (
                {"none": "0110"} if words[words.index("--method") + 1] == "sft" else {"none": "0110", "matrix": "1111"}
            )
            with open(words[words.index("--output") + 1], "w") as stream:
                json.dump(result(marks), stream)
        elif script.endswith("train.py"):
            folder = words[words.index("--output_dir") + 1]
            with open(f"{folder}/run_state.json", "w") as stream:
                json.dump({"state": "finished"}, stream)
            Path(folder, "checkpoint-5").mkdir(exist_ok=True)
        return 7.0

    monkeypatch.setattr(run, "_python", python)
    return noted


def command(tmp_path, *more):
    return ["--table", "main", "--model", "gemma", "--output", str(tmp_path / "out"), "--results",
            str(tmp_path / "results"), "--jobs", "1", *more]  # fmt: skip


def test_only_what_is_missing_is_run(calls, tmp_path, capsys):
    run.main(command(tmp_path, "--seeds", "1"))
    assert [script.rsplit("/")[-1] for script, _ in calls[:2]] == ["prepare_data.py", "prepare_model.py"]
    assert len(calls) == 2 + 2 * len(TABLES["main"])
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    calls.clear()
    (tmp_path / "out/runs/gemma/cc-seed1/result.json").unlink()
    run.main(command(tmp_path, "--seeds", "1"))
    done = [(script, words[words.index("--model") + 1]) for script, words in calls if "measure" in script]
    assert done == [("experiments/measure.py", str(tmp_path / "out/runs/gemma/cc-seed1"))]
    assert not any("train.py" in script for script, _ in calls), "a finished training is not done again"
    calls.clear()
    run.main(command(tmp_path, "--seeds", "2"))
    assert {words[words.index("--seed") + 1] for script, words in calls if "train.py" in script} == {"2"}
    table = (tmp_path / "results/main-gemma.md").read_text()
    assert "| cc, matrix | +50.0 ± 0.0 [" in table
    assert "Difference from sft-english in points" in table
    assert "| cc, matrix | 75.0 ± 0.0 | 75.0 ± 0.0 | 75.0 ± 0.0 |" in table, "the commonest answer's share"
    assert json.loads((tmp_path / "results/main-gemma.json").read_text())["arms"]["sft-english"]["twins"] is True


@pytest.mark.parametrize("where", ["out/choice.json", "results/main-gemma.json"])
def test_runs_of_other_questions_do_not_pass_for_these(calls, tmp_path, where):
    run.main(command(tmp_path, "--seeds", "1"))
    calls.clear()
    for path in ("out/choice.json", "results/main-gemma.json"):
        if path != where:
            (tmp_path / path).unlink()
    with pytest.raises(ValueError, match=rf"{where} is of --split dev, not test, --benchmark_rows 20, not 200: give"):
        run.main(command(tmp_path, "--seeds", "1", "--split", "test", "--benchmark_rows", "200"))
    assert not calls
    with pytest.raises(ValueError, match="--max_steps None, not 4"):
        run.main(command(tmp_path, "--seeds", "1", "--max_steps", "4"))


def test_a_model_is_asked_what_it_is_to_be_asked(calls, tmp_path):
    run.main(command(tmp_path, "--seeds", "1", "--model", "smollm2", "--split", "test", "--benchmark_rows", "50"))
    assert calls[0][1][-4:] == ["--split", "test", "--benchmark_rows", "50"]
    words = next(words for script, words in calls if "measure" in script)
    start = words.index("--pairs")
    assert words[start : start + 8] == ["--pairs", "250", "--every", "2", "--without", "bn", "te", "--output"]


def test_one_failure_does_not_stop_the_others(calls, tmp_path, monkeypatch):
    good = run._python

    def python(script, *words, **options):
        if "train.py" in script and "cc-seed1" in " ".join(map(str, words)):
            raise ValueError("killed")
        return good(script, *words, **options)

    monkeypatch.setattr(run, "_python", python)
    with pytest.raises(ValueError, match="cc-seed1: killed"):
        run.main(command(tmp_path, "--seeds", "1"))
    assert (tmp_path / "out/runs/gemma/cc-nograd-seed1/result.json").is_file()
    assert "cc-nograd, matrix" in (tmp_path / "results/main-gemma.md").read_text()


def test_a_training_that_was_told_to_stop_is_not_asked(calls, tmp_path, monkeypatch):
    good = run._python

    def python(script, *words, **options):
        seconds = good(script, *words, **options)
        if "train.py" in script and "cc-seed1" in " ".join(map(str, words)):
            (tmp_path / "out/runs/gemma/cc-seed1/run_state.json").write_text('{"state": "preempted"}')
        return seconds

    monkeypatch.setattr(run, "_python", python)
    with pytest.raises(ValueError, match="cc-seed1: the training was stopped before its end"):
        run.main(command(tmp_path, "--seeds", "1"))
    assert (tmp_path / "out/runs/gemma/cc-seed1/checkpoint-5").is_dir(), "it can go on from there"
    monkeypatch.setattr(run, "_python", good)
    run.main(command(tmp_path, "--seeds", "1"))
    assert (tmp_path / "out/runs/gemma/cc-seed1/result.json").is_file()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_run(arm, model, tmp_path):
    config = load_config(train_options(arm, model, 2, tmp_path, tmp_path / "start", tmp_path / "run"))
    assert (config.train.method, config.train.seed) == (ARMS[arm].method, 2)
    assert config.train.resume_from_checkpoint == "latest" and config.train.save_steps
    rows = settings(model)["per_device_train_batch_size"]
    assert config.train.per_device_train_batch_size == (2 * rows if arm.endswith("-english") else rows)
    assert config.cc.english_grad is (arm != "cc-nograd")


def test_a_step_with_twins_holds_the_same_rows_and_their_twins(tmp_path):
    rows = [
        {"instruction": f"t{n}\u2028", "instruction_en": f"e{n}", "output": str(n), "lang": "sw"} for n in range(50)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    run.write_twins(path, 3, tmp_path / "twins.jsonl")
    with open(tmp_path / "twins.jsonl") as stream:
        twins = [json.loads(line) for line in stream]
    for step, with_twins in zip(range(6), BatchStream(twins, 16, 3), strict=False):  # 6 of 8 rows: an epoch is 50
        alone = [rows[n] for n in map(BatchStream(rows, 8, 3).index_at, range(8 * step, 8 * step + 8))]
        assert with_twins[::2] == alone
        english = [{"instruction": row["instruction_en"], "output": row["output"], "lang": "en"} for row in alone]
        assert with_twins[1::2] == english


def test_an_item_is_the_mean_over_languages():
    found = result({"none": "0110"})
    found["tasks"]["sib200"]["correct"]["none"]["yo"] = "0000"
    group = report.Group("sw, yo", "sib200", ("sw", "yo"))
    np.testing.assert_array_equal(report.items(found, "none", group), [0, 0.5, 0.5, 0])


def test_a_difference_pairs_items_and_counts_seeds():
    same = np.zeros(40)
    better = np.array([1.0, 0.0] * 20)
    text = report._difference([(same, better), (same, same)])
    assert text.startswith("+25.0 ± 35.4 [") and text.endswith("] p 0.500 (1/2)"), "the items alone would say **"
    assert report._difference([(better, better)]) == "+0.0 [+0.0, +0.0] (0/1)"


def test_a_difference_is_marked_where_items_and_seeds_agree():
    same = np.zeros(40)
    shares = [np.arange(40) % 10 < tenths for tenths in (5, 6, 5)]
    text = report._difference([(same, share) for share in shares])
    # gains of 50, 60, 50: t = (160 / 3) / (5.774 / sqrt 3) = 16, and two degrees have p = 1 - t / sqrt(2 + t^2)
    assert text.startswith("+53.3 ± 5.8 [") and text.endswith("] p 0.004 ** (3/3)")
    assert " p - (3/3)" in report._difference([(same, shares[0])] * 3), "no spread, no test"
    assert report._difference([(same, shares[0])]).endswith("] (1/1)")


def test_what_the_gate_chose_and_how_the_matrices_fit():
    runs = [
        {"arm": "sft", "seed": 1} | result({"none": "01"}),
        {"arm": "cc", "seed": 1} | result({"none": "01", "matrix": "11"}),
    ]
    runs.append({"arm": "cc", "seed": 2} | result({"none": "01", "matrix": "11"}))
    runs[2]["training"]["lines"][-1] |= {"gate_entropy": 1.0, "chosen_layers": {"sw": [6.0, 0.0]}}
    runs[2]["fit"] = {"identity": 0.7, "matrix": 0.35, "rows: rows": 0.2}
    lines = report._gates(runs).splitlines()
    assert len(lines) == 3
    found = dict(zip(lines[0].strip("| ").split(" | "), lines[2].strip("|").split("|")[1:], strict=True))
    assert {name: value.strip() for name, value in found.items() if "-, -" not in value} == {
        "entropy": "0.75", "ratio": "2.00", "sw": "1 (75), 0 (100)", "yo": "0 (100), -"
    }  # fmt: skip
    assert report._fits(runs).splitlines()[2] == "| cc | 0.600 | 0.300 | 0.200 (seed 2) |"


def test_a_mode_that_one_seed_alone_was_asked_in():
    runs = [{"arm": "sft", "seed": seed, "train_cpu_seconds": 1.0} | result({"none": "0110"}) for seed in (1, 2)]
    runs += [
        {"arm": "cc", "seed": 1, "train_cpu_seconds": 1.0} | result({"none": "0110", "matrix": "0010"}),
        {"arm": "cc", "seed": 2, "train_cpu_seconds": 1.0} | result({"none": "0110", "matrix": "1110", "rows": "1111"}),
    ]
    assert "| cc, matrix | 50.0 ± 35.4 |" in report._scores(runs)
    assert "| cc, rows (seed 2) | 100.0 |" in report._scores(runs)
    assert "| cc, rows | +50.0 [" in report._differences(runs, "sft") and "(1/1)" in report._differences(runs, "sft")
