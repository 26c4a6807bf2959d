"""Runs paired by their rows' ids, on hand-made results."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cc_ds.eval.comparison import compare_runs, format_markdown, plot_comparisons, read_runs, write_csv


def result(path: Path, scores: dict[str, list[float]], mode="plain", task="T", rule="choice", skip=()) -> Path:
    answers = [
        {"id": f"{lang}{n}", "item": f"{n}", "lang": lang, "scores": {"accuracy": value}}
        for lang, values in scores.items()
        for n, value in enumerate(values)
        if f"{lang}{n}" not in skip
    ]
    body = {
        "task": task,
        "mode": mode,
        "rules": {"accuracy": rule},
        "answers": answers,
        "seconds": 2.0,
        "tokens_out": 9,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def runs(tmp_path, **files):
    return [run for name, scores in files.items() for run in read_runs(result(tmp_path / f"{name}.json", scores))]


def test_differences_by_language_and_group(tmp_path):
    base = {"de": [1, 1, 0, 0], "sw": [0] * 10, "yo": [1, 0]}
    other = {"de": [1, 1, 1, 0], "sw": [1] * 10, "yo": [1, 0]}
    found = compare_runs(runs(tmp_path, base=base, other=other))
    assert list(found.lines) == ["de", "sw", "yo", "high", "low", "macro"]
    assert [cell.mean for cell in found.lines["macro"]] == [(0.5 + 0 + 0.5) / 3, (0.75 + 1 + 0.5) / 3]
    assert found.lines["low"][1].difference.mean == 0.5 and found.rows == {
        "de": 4, "sw": 10, "yo": 2, "high": 4, "low": 12, "macro": 16,
    }  # fmt: skip
    assert found.lines["sw"][1].difference.p == pytest.approx(2 * 0.5**10)
    text = format_markdown(found)
    assert "| sw | 10 | 0.0 | 100.0 | +100.0 [+100.0, +100.0] ** |" in text
    assert "| de | 4 | 50.0 | 75.0 | +25.0 [" in text and "base (plain): 9 tokens out in 2.0 s" in text
    write_csv([found], tmp_path / "c.csv")
    with open(tmp_path / "c.csv", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 12 and lines[3]["run"] == "other (plain)" and float(lines[3]["difference"]) == 1
    plot_comparisons([found], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_averages_redraw_an_item_in_all_its_languages(tmp_path):
    """The same 20 items gained and 16 lost in five languages: as clear as in one, and no clearer."""
    base, other = [1.0] * 16 + [0.0] * 20 + [1.0] * 24, [0.0] * 16 + [1.0] * 44
    files = {
        name: dict.fromkeys(("de", "es", "ru", "sw", "yo"), v) for name, v in {"base": base, "other": other}.items()
    }
    found = compare_runs(runs(tmp_path, **files))
    one, macro = (found.lines[line][1].difference for line in ("sw", "macro"))
    assert (macro.low, macro.high) == pytest.approx((one.low, one.high)) and macro.p > 0.4


def test_rows_pair_by_id_in_any_order_and_the_rest_is_counted(tmp_path):
    first = result(tmp_path / "a.json", {"sw": [1, 0, 1]})
    second = result(tmp_path / "b.json", {"sw": [0, 1, 1]}, skip=("sw0",))
    content = json.loads(second.read_text())
    content["answers"].reverse()
    second.write_text(json.dumps(content))
    found = compare_runs([*read_runs(first), *read_runs(second)])
    assert found.rows["sw"] == 2 and found.left_out == 1
    assert [cell.mean for cell in found.lines["sw"]] == [0.5, 1.0]
    assert "1 rows of a (plain) were not answered by every run" in format_markdown(found)


def test_the_same_row_twice_pairs_with_its_like(tmp_path):
    first = result(tmp_path / "a.json", {"sw": [1, 0]})
    content = json.loads(first.read_text())
    content["answers"].append(content["answers"][0])
    first.write_text(json.dumps(content))
    found = compare_runs([*read_runs(first), *read_runs(first)])
    assert found.rows["sw"] == 3 and found.lines["sw"][1].difference.p == 1


def test_what_cannot_be_compared_is_said(tmp_path):
    base = runs(tmp_path, base={"sw": [1]})
    with pytest.raises(ValueError, match="needs two runs"):
        compare_runs(base)
    with pytest.raises(ValueError, match="do not both score 'accuracy' by one rule"):
        compare_runs([*base, *read_runs(result(tmp_path / "o.json", {"sw": [1]}, rule="inclusion"))])
    with pytest.raises(ValueError, match="do not both score 'f1'"):
        compare_runs([*base, *base], "f1")
    with pytest.raises(ValueError, match="answered the same rows"):
        compare_runs([*base, *read_runs(result(tmp_path / "p.json", {"de": [1]}))])
    (tmp_path / "bad").mkdir()
    with pytest.raises(ValueError, match=r"bad: no \.json files"):
        read_runs(tmp_path / "bad")
    (tmp_path / "bad" / "x.json").write_text('{"task": 1}')
    with pytest.raises(ValueError, match=r"x\.json: not a result of tools/evaluate.py"):
        read_runs(tmp_path / "bad")
