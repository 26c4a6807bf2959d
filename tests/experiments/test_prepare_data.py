"""Rows of the experiment: twins, and nothing of what is asked in what is trained on."""

import json

import pytest

from cc_ds.config import read_yaml
from experiments.prepare_data import BENCHMARKS, LEFT_OUT, TARGETS, WORDING, prepare

LABELS = ["health", "science/technology", "travel"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "source"
    for lang in read_yaml(str(WORDING)):
        for split, first in (("train", 0), ("dev", 100)):
            rows = [{"id": first + n, "label": LABELS[n], "text": f"{lang} {split} {n}"} for n in range(3)]
            write(folder / "sib200" / f"{lang}.{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write(folder / "ntrex" / f"{lang}.txt", f"{lang} news 0\n{lang} news\u2028 1\n")
    for name in BENCHMARKS:
        for lang in ("en", "sw"):
            rows = [{"prompt": f"{lang} question {n}", "answer": "1"} for n in range(4)]
            write(folder / "benchmarks" / name / f"{lang}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def test_training_rows_have_their_twins(data, tmp_path):
    prepare(data, tmp_path / "out")
    rows = read(tmp_path / "out" / "train.jsonl")
    assert len(rows) == 3 * len(TARGETS) and {row["lang"] for row in rows} == set(TARGETS)
    row = next(row for row in rows if row["lang"] == "yo" and row["output"] == "science")
    assert row["instruction"].startswith("yo train 1\n") and row["instruction_en"].startswith("en train 1\n")
    assert row["instruction"].endswith(read_yaml(str(WORDING))["yo"])


def test_questions_and_pairs(data, tmp_path):
    prepare(data, tmp_path / "out", benchmark_rows=2)
    sib = read(tmp_path / "out" / "ask" / "sib200.jsonl")
    assert {row["lang"] for row in sib} == {"en", *TARGETS, *LEFT_OUT}
    assert all(row["answer"] in row["options"] for row in sib)
    xnli = read(tmp_path / "out" / "ask" / "xnli.jsonl")
    assert [(row["lang"], row["item"], row["prompt_en"]) for row in xnli if row["lang"] == "sw"] == [
        ("sw", 0, "en question 0"), ("sw", 1, "en question 1"),
    ]  # fmt: skip
    pairs = read(tmp_path / "out" / "pairs.jsonl")
    assert len(pairs) == 2 * len(TARGETS) and pairs[1]["instruction_en"].startswith("en news")


def test_another_split_is_asked_when_told_so(data, tmp_path):
    for lang in ("en", *TARGETS, *LEFT_OUT):
        write(data / "sib200" / f"{lang}.test.jsonl", json.dumps({"id": 9, "label": "travel", "text": f"{lang} held"}))
    prepare(data, tmp_path / "out", "test")
    assert [row["prompt"].split("\n")[0] for row in read(tmp_path / "out/ask/sib200.jsonl")][:2] == [
        "en held",
        "sw held",
    ]
    prepare(data, tmp_path / "dev")
    assert (tmp_path / "dev/train.jsonl").read_text() == (tmp_path / "out/train.jsonl").read_text()


def test_a_sentence_that_is_asked_about_is_never_trained_on(data, tmp_path):
    path = data / "sib200" / "th.train.jsonl"
    write(path, path.read_text(encoding="utf-8").replace("th train 2", "th dev 0"))
    with pytest.raises(ValueError, match="in train and in dev"):
        prepare(data, tmp_path / "out")


def test_rows_that_are_not_parallel_are_refused(data, tmp_path):
    path = data / "sib200" / "th.train.jsonl"
    write(path, path.read_text(encoding="utf-8").replace('"id": 1', '"id": 7'))
    with pytest.raises(ValueError, match="th is not row by row the same as en"):
        prepare(data, tmp_path / "out")
