"""Tasks read from files, folders and the Atlas; what is wrong in a row is said with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cc_ds.eval.benchmarks import BENCHMARKS, resource_level
from cc_ds.eval.metrics import chosen_option
from cc_ds.eval.tasks import load_task

SHARED = Path(__file__).parents[4] / "shared" / "data" / "benchmarks"


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


def test_rows_of_one_item_share_its_name(tmp_path):
    write(tmp_path / "en.jsonl", [{"prompt": f"q{i}", "answer": "x"} for i in range(3)])
    write(tmp_path / "sw.jsonl", [{"prompt": f"s{i}", "answer": "x"} for i in range(3)])
    paired = [row.item for row in load_task("paired", tmp_path).rows]
    assert paired[:3] == paired[3:] and len(set(paired)) == 3
    # In one file, in another order, one row without English.
    rows = [{"prompt": f"s{i}", "prompt_en": f"q{i}", "answer": "x", "lang": "sw"} for i in (2, 0)]
    rows.append({"prompt": "s1", "answer": "x", "lang": "sw"})
    mixed = [row.item for row in load_task("mixed", write(tmp_path / "mixed.jsonl", rows)).rows]
    assert mixed[:2] == [paired[2], paired[0]] and mixed[2] not in paired
    # Without any English: by place.
    (tmp_path / "en.jsonl").unlink()
    (tmp_path / "mixed.jsonl").unlink()
    write(tmp_path / "yo.jsonl", [{"prompt": f"y{i}", "answer": "x"} for i in range(3)])
    placed = [row.item for row in load_task("placed", tmp_path).rows]
    assert placed[:3] == placed[3:] and len(set(placed)) == 3


def test_rows_of_a_language_that_share_their_english_prompt_are_items_of_their_own(tmp_path):
    same = {"prompt_en": "What is it?", "answer": "x"}
    for lang in ("sw", "yo"):
        write(tmp_path / f"{lang}.jsonl", [{"prompt": f"{lang}{i}"} | same for i in range(3)])
    items = [row.item for row in load_task("shared", tmp_path).rows]
    assert items[:3] == items[3:] and len(set(items)) == 3


def test_atlas_is_the_demo_test_split():
    from cc_ds.demo.atlas import build_atlas

    rows = load_task("atlas", seed=1).rows
    expected = build_atlas(1).test
    assert [(row.lang, row.answers, row.prompt[0]["content"]) for row in rows] == [
        (row["lang"], tuple(row["answers"]), row["instruction"]) for row in expected
    ]
    assert all(row.prompt_en for row in rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks (../shared/data/benchmarks) are not here")
@pytest.mark.parametrize(("name", "count"), [(name, 500 if name == "XLSum" else 2000) for name in BENCHMARKS])
def test_benchmark_folders(name, count):
    task = load_task(name, SHARED / name)
    assert len(task.rows) == count and {row.lang for row in task.rows} == set(BENCHMARKS[name].languages)
    assert all(row.prompt_en for row in task.rows if row.lang != "en")
    assert len({row.id for row in task.rows}) > 0.99 * count
    assert task.rules == BENCHMARKS[name].rules and task.max_new_tokens == 40
    for row in task.rows:
        # The answer itself, said by the model, is right by the headline; another option is wrong.
        assert task.score(row, row.answers[0])[task.headline] == pytest.approx(1), row
        if row.options:
            key = row.answers[0]
            assert all(row.options.values())
            assert task.score(row, f"({key}) {row.options[key]}")["accuracy"] == 1, row
            other = next(option for option in row.options if option != key)
            assert task.score(row, f"{other}. {row.options[other]}")["accuracy"] == 0, row


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks (../shared/data/benchmarks) are not here")
@pytest.mark.parametrize("name", ["MMMLU", "XNLI", "XStoryCloze"])
def test_every_option_is_named_by_its_text_and_by_its_key(name):
    forms = (
        "{}",
        "({})",
        "{}.",
        "**{}**",
        "The answer is {}.",
        "A única opção correta é {}",
        "Bẹ́ẹ̀ni, {}",
        "정답은 {}입니다",
    )
    for row in load_task(name, SHARED / name).rows:
        texts = list(row.options.values())
        for key, text in row.options.items():
            for form in forms:
                assert chosen_option(form.format(key), row.options) == key, (form, row)
            if texts.count(text) == 1 and text not in row.options:
                assert chosen_option(text, row.options) == key == chosen_option(f"{text}.", row.options), row


def test_a_benchmark_brings_its_rules_and_checks_its_answers(tmp_path):
    prompt = "Nguzo: a\n(1) nani\n\n(1) ndiyo\n(2) hapana\n(3) sijui\n\nJibu:"
    task = load_task("xnli", write(tmp_path / "sw.jsonl", [{"prompt": prompt, "answer": "2"}]))
    assert task.name == "XNLI" and task.rows[0].options == {"1": "ndiyo", "2": "hapana", "3": "sijui"}
    assert task.score(task.rows[0], "Hapana.") == {"accuracy": 1}
    with pytest.raises(ValueError, match=r"line 1: the answer \('hapana',\) is none of the options 1, 2, 3"):
        load_task("XNLI", write(tmp_path / "yo.jsonl", [{"prompt": prompt, "answer": "hapana"}]))


def test_mkqa_accepts_numbers_and_dates_as_people_write_them(tmp_path):
    task = load_task("MKQA", write(tmp_path / "en.jsonl", [{"prompt": "q", "answer": ["1961-09-10", "25.0 episodes"]}]))
    for said in ("It was on 10 September 1961.", "September 10, 1961", "25 episodes"):
        assert task.score(task.rows[0], said)["accuracy"] == 1
    assert task.score(task.rows[0], "25 episodes") == {"accuracy": 1, "squad_em": 1, "f1": 1}
    assert task.score(task.rows[0], "1961")["accuracy"] == 0
    german = load_task("MKQA", write(tmp_path / "de.jsonl", [{"prompt": "q", "answer": ["no"]}]))
    assert german.score(german.rows[0], "Nein.") == {"accuracy": 1, "squad_em": 1, "f1": 1}
    plain = load_task("mine", tmp_path / "en.jsonl")
    assert plain.score(plain.rows[0], "25 episodes")["inclusion"] == 0


def test_resource_levels():
    assert [resource_level(code) for code in ("pt-BR", "zh_Hans_CN", "EN", "sw-KE", "und")] == [
        *["high"] * 3,
        "low",
        "low",
    ]


def test_languages_and_metrics_are_chosen(tmp_path):
    for lang in ("sw", "de"):
        write(tmp_path / f"{lang}.jsonl", [{"prompt": "q", "answer": "x"}])
    task = load_task("mine", tmp_path, langs=["sw"], metrics=["f1", "rouge_l"])
    assert [row.lang for row in task.rows] == ["sw"] and task.headline == "f1"
    assert task.score(task.rows[0], "x y") == {"f1": pytest.approx(2 / 3), "rouge_l": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="no rows in fr; there are de, sw"):
        load_task("mine", tmp_path, langs=["fr", "sw"])
    with pytest.raises(ValueError, match="unknown metrics bleu: there are exact_match"):
        load_task("mine", tmp_path, metrics=["bleu"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"answer": "x", "instrction": "q"},
            r"line 2: column instruction is missing. Nearest to 'instruction': 'instrction'[\s\S]*or prompt \(English",
        ),
        ({"answer": "x", "prompt": None}, "line 2: .*empty"),
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
