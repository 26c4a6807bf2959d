"""The six benchmarks from repositories in the hub's layout and column format, made here; prompts as the authors'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml

from cc_ds.eval.benchmarks import BENCHMARKS
from cc_ds.eval.hub import _wording, _wordings
from cc_ds.eval.tasks import load_task

SHARED = Path(__file__).parents[4] / "shared" / "data" / "benchmarks"
FIELDS = {
    "XNLI": {"premise", "hypothesis"},
    "XStoryCloze": {"story", "ending1", "ending2"},
    "MMMLU": {"question", "A", "B", "C", "D"},
    "XQuAD": {"context", "question"},
    "MKQA": {"question"},
    "XLSum": {"title", "text"},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def repository(hub: Path, repo: str, split: str, configs: dict[str, list[dict]], features=None) -> None:
    """A data set repository of parquet files, one configuration each, as the hub serves them."""
    folder = hub / repo
    for config, rows in configs.items():
        (folder / config).mkdir(parents=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / config / f"{split}-0.parquet")
    known = [
        {"config_name": config, "data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"}]}
        for config in configs
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': known})}---\n", encoding="utf-8")


def load(name: str, hub: Path, *langs: str):
    return load_task(name, langs=langs, hub_dir=hub).rows


def prompts(rows) -> list[str]:
    return [row.prompt[0]["content"] for row in rows]


def test_xnli(tmp_path):
    label = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    text = datasets.Value("string")
    features = datasets.Features({"premise": text, "hypothesis": text, "label": label})
    rows = {
        "en": [{"premise": "p1", "hypothesis": "h1", "label": 2}, {"premise": "p2", "hypothesis": "h2", "label": 0}],
        "sw": [{"premise": "n1", "hypothesis": "d1", "label": 2}, {"premise": "n2", "hypothesis": "d2", "label": 1}],
    }
    repository(tmp_path, "facebook/xnli", "test", rows, features)
    first, second, english, _ = load("xnli", tmp_path, "sw", "en")
    assert first.prompt[0]["content"].startswith("Nguzo: n1\nNadharia: d1\n\nUnafikiri")
    assert first.answers == ("3",) and first.lang == "sw" and english.prompt_en is None
    assert first.options == {"1": "Inajumuisha", "2": "Kuegemea upande wowote", "3": "Kupingana"}
    assert first.prompt_en[0]["content"].startswith("Premise: p1\nHypothesis: h1\n")
    assert second.prompt_en is None, "another label: not the same item"
    assert first.item == english.item != second.item
    assert second.where == f"{tmp_path}/facebook/xnli (sw), row 2"


def test_xstorycloze(tmp_path):
    def story(name: str, lang: str, right: int) -> dict:
        sentences = {f"input_sentence_{n}": f"{lang}{n}. " for n in (1, 2, 3, 4)}
        return {
            "story_id": name,
            **sentences,
            "sentence_quiz1": "x",
            "sentence_quiz2": "y",
            "answer_right_ending": right,
        }

    rows = {"en": [story("a", "E", 1), story("b", "E", 2)], "eu": [story("b", "B", 2)]}
    repository(tmp_path, "juletxara/xstory_cloze", "eval", rows)
    (row,) = load("XStoryCloze", tmp_path, "eu")
    assert row.prompt[0]["content"].startswith("B1.B2.B3.B4.\n(1) x\n(2) y\n\nBi aukeretatik")
    assert row.prompt_en[0]["content"].startswith("E1.E2.E3.E4.\n(1) x") and row.answers == ("2",)


def test_mmmlu_takes_its_english_from_mmlu(tmp_path):
    def translated(question: str, answer: str) -> dict:
        return {"Unnamed: 0": 0, "Question": question, "A": "a", "B": "b", "C": "c", "D": "d", "Answer": answer,
                "Subject": "anatomy"}  # fmt: skip

    repository(tmp_path, "openai/MMMLU", "test", {"YO_NG": [translated("ibeere", "B"), translated("meji", "A")]})
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "subject": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=list("ABCD")),
        }
    )
    english = [
        {"question": "q", "subject": "anatomy", "choices": list("wxyz"), "answer": 1},
        {"question": "r", "subject": "law", "choices": list("wxyz"), "answer": 0},
    ]
    repository(tmp_path, "cais/mmlu", "test", {"all": english}, features)
    first, second, own, _ = load("MMMLU", tmp_path, "yo", "en")
    assert "\n\nibeere\n(A) a\n(B) b\n(C) c\n(D) d\n\n" in first.prompt[0]["content"] and first.answers == ("B",)
    assert first.prompt_en == own.prompt and "q\n(A) w\n(B) x" in own.prompt[0]["content"]
    assert second.prompt_en is None, "another subject: the rows are not parallel there"
    assert first.options["D"] == "d" and own.lang == "en"


def test_xquad(tmp_path):
    def item(key: str, question: str) -> dict:
        return {
            "id": key,
            "context": "c",
            "question": question,
            "answers": {"text": ["x", "y"], "answer_start": [0, 1]},
        }

    rows = {"xquad.en": [item("1", "one"), item("2", "two")], "xquad.zh": [item("2", "二")]}
    repository(tmp_path, "google/xquad", "validation", rows)
    (row,) = load("XQuAD", tmp_path, "zh")
    assert row.prompt[0]["content"].endswith("上下文： c\n问题： 二\n\n您的答案：") and row.answers == ("x", "y")
    assert row.item == "2"
    assert row.prompt_en[0]["content"].endswith("Question: two\n\nYour answer:")


def test_mkqa_takes_aliases_and_leaves_out_what_has_no_short_answer(tmp_path):
    def item(key: str, **answers) -> dict:
        queries = {lang: f"{lang}-{key}" for lang in answers}
        return {"example_id": key, "queries": queries, "answers": answers}

    def answer(text: str | None, *aliases: str) -> dict:
        return {"type": 0, "entity": "", "text": text, "aliases": list(aliases)}

    rows = [
        item("1", en=[answer("NYC", "New York")], zh_cn=[answer("纽约"), answer("曼哈顿", "纽约")]),
        item("2", en=[answer(None)], zh_cn=[answer(None)]),
        item("3", en=[answer("")], zh_cn=[answer("")]),
    ]
    repository(tmp_path, "apple/mkqa", "train", {"mkqa": rows})
    chinese, english = load("MKQA", tmp_path, "zh", "en")
    assert chinese.prompt[0]["content"] == "请回答以下问题。\n\nzh_cn-1\n\n您的答案："
    assert chinese.answers == ("纽约", "曼哈顿") and english.answers == ("NYC", "New York")
    assert chinese.prompt_en == english.prompt


def test_xlsum_has_no_english_twin(tmp_path):
    row = {"id": "1", "url": "u", "title": "Habari", "summary": "fupi", "text": "ndefu {kabisa}"}
    repository(tmp_path, "csebuetnlp/xlsum", "test", {"swahili": [row]})
    (found,) = load("XLSum", tmp_path, "sw")
    assert found.prompt[0]["content"].endswith("moja.\nHabari\nndefu {kabisa}")
    assert found.answers == ("fupi",) and found.prompt_en is None and not found.item


SUMMARY = {"id": "1", "url": "u", "title": "Habari", "summary": "fupi", "text": "ndefu"}


def test_a_loading_script_gives_way_to_the_hubs_own_conversion(monkeypatch):
    calls = []

    def load_dataset(path, name=None, **more):
        calls.append((path, name, more))
        if "revision" not in more:
            raise RuntimeError("Dataset scripts are no longer supported, but found xlsum.py")
        return [SUMMARY]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = load("XLSum", None, "sw")
    assert row.answers == ("fupi",) and row.where == "csebuetnlp/xlsum (swahili), row 1"
    files = {"data_files": {"test": "swahili/test/*.parquet"}, "revision": "refs/convert/parquet"}
    assert calls == [
        ("csebuetnlp/xlsum", "swahili", {"split": "test"}),
        ("csebuetnlp/xlsum", None, {"split": "test", **files}),
    ]


def test_a_copied_loading_script_is_told_the_branch_and_a_copy_of_that_is_read(tmp_path):
    folder = tmp_path / "csebuetnlp" / "xlsum"
    folder.mkdir(parents=True)
    (folder / "xlsum.py").write_text("", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"Dataset scripts are no longer supported.*\(--hub_dir\).*refs/convert/parquet"
    ):
        load("XLSum", tmp_path, "sw")
    (folder / "xlsum.py").unlink()
    for config in ("swahili", "turkish"):
        (folder / config / "test").mkdir(parents=True)
        row = SUMMARY | {"title": config}
        datasets.Dataset.from_list([row]).to_parquet(folder / config / "test" / "0000.parquet")
    (row,) = load("XLSum", tmp_path, "sw")
    assert "\nswahili\n" in row.prompt[0]["content"]


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"XNLI: cannot load 'en', split 'test', of the data set .*--hub_dir"):
        load("XNLI", tmp_path, "sw")
    with pytest.raises(ValueError, match=r"XNLI: no prompt is written for 'fr' .*wording.yaml"):
        load("XNLI", tmp_path, "fr")
    repository(tmp_path, "csebuetnlp/xlsum", "test", {"swahili": [{"id": "1", "heading": "x"}]})
    with pytest.raises(ValueError, match=r"xlsum \(swahili\), row 1: not in the data set's known format"):
        load("XLSum", tmp_path, "sw")


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_language_has_its_wording(name):
    assert set(_wordings()[name]) == set(BENCHMARKS[name].languages)
    for template in _wordings()[name].values():
        assert set(re.findall(r"{(\w+)}", template)) == FIELDS[name]
    assert len({lang for known in BENCHMARKS.values() for lang in known.languages}) == 22


@pytest.mark.skipif(not SHARED.is_dir(), reason="the authors' prompts (../shared/data/benchmarks) are not here")
@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_wording_is_the_authors(name):
    """Each of their prompts is our template with something in its places, up to what the fields hold."""
    for lang in BENCHMARKS[name].languages:
        pattern = re.escape(_wording(name, lang))
        for field in FIELDS[name]:
            pattern = pattern.replace(re.escape("{" + field + "}"), f"(?P<{field}>.+)")
        for line in (SHARED / name / f"{lang}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
            found = re.fullmatch(pattern, json.loads(line)["prompt"], re.DOTALL)
            assert found, (lang, line)
