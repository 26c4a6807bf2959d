"""Tasks read from files, folders and the Atlas; what is wrong in a row is said with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cc_ds.eval.tasks import load_task

BENCHMARKS = Path(__file__).parents[4] / "shared" / "data" / "benchmarks"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_all_forms_of_a_row(tmp_path):
    rows = [
        {"instruction": "a", "input": "b", "output": "c", "instruction_en": "A", "lang": "sw"},
        {"prompt": "a", "answer": ["c", "d"], "prompt_en": "A"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "answers": ["c"]},
    ]
    first, second, third = load_task("mine", write(tmp_path / "yo.jsonl", rows)).rows
    assert first.prompt == [{"role": "user", "content": "a\nb"}] and first.answers == ("c",) and first.lang == "sw"
    assert first.prompt_en == [{"role": "user", "content": "A"}]
    assert second.answers == ("c", "d") and second.lang == "yo"
    assert [message["role"] for message in third.prompt] == ["system", "user"] and third.prompt_en is None
    assert second.where == f"{tmp_path / 'yo.jsonl'}, line 2"


def test_folder_pairs_rows_with_english_by_their_place(tmp_path):
    write(tmp_path / "en.jsonl", [{"prompt": f"q{i}", "answer": "x"} for i in range(3)])
    write(tmp_path / "sw.jsonl", [{"prompt": f"s{i}", "answer": "x"} for i in range(3)])
    rows = load_task("folder", tmp_path).rows
    assert [row.prompt_en and row.prompt_en[0]["content"] for row in rows] == [None] * 3 + ["q0", "q1", "q2"]


@pytest.mark.parametrize("spoiled", ["count", "own"])
def test_folder_does_not_guess_where_rows_are_not_parallel(tmp_path, spoiled):
    write(tmp_path / "en.jsonl", [{"prompt": f"q{i}", "answer": "x"} for i in range(2 if spoiled == "count" else 3)])
    swahili = [{"prompt": f"s{i}", "answer": "x"} for i in range(3)]
    if spoiled == "own":
        swahili[1]["prompt_en"] = "its own"
    write(tmp_path / "sw.jsonl", swahili)
    english = [row.prompt_en for row in load_task("folder", tmp_path).rows if row.lang == "sw"]
    assert english == [None, [{"role": "user", "content": "its own"}] if spoiled == "own" else None, None]


def test_atlas_is_the_demo_test_split():
    from cc_ds.demo.atlas import build_atlas

    rows = load_task("atlas", seed=1).rows
    expected = build_atlas(1).test
    assert [(row.lang, row.answers, row.prompt[0]["content"]) for row in rows] == [
        (row["lang"], tuple(row["answers"]), row["instruction"]) for row in expected
    ]
    assert all(row.prompt_en for row in rows)


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks (../shared/data/benchmarks) are not here")
@pytest.mark.parametrize(("name", "count"), [("MKQA", 2000), ("XLSum", 500), ("XNLI", 2000)])
def test_benchmark_folders(name, count):
    rows = load_task(name, BENCHMARKS / name).rows
    assert len(rows) == count and len({row.lang for row in rows}) == 10
    assert all(row.prompt_en for row in rows if row.lang != "en")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "line 2: .*empty"),
        ({"prompt": " ", "answer": "x"}, "line 2: .*empty"),
        ({"prompt": "q"}, "line 2: no accepted answer"),
        ({"prompt": "q", "answer": []}, "line 2: answer must be"),
        ({"prompt": "q", "answer": ["x", " "]}, "line 2: answer holds an empty"),
        ({"prompt": "q", "answer": [3]}, "line 2: answer holds an empty or non-text"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = write(tmp_path / "sw.jsonl", [{"prompt": "q", "answer": "x"}, row])
    with pytest.raises(ValueError, match=message):
        load_task("mine", path)


def test_unknown_task_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'atlsa'"):
        load_task("atlsa")
    with pytest.raises(ValueError, match=r"no \.jsonl files"):
        load_task("mine", tmp_path)
