"""Sampled pairs: seeded, balanced, and with no English prompt on both sides of the split."""

from __future__ import annotations

from collections import Counter

import pytest

from cc_ds.data.pairs import Row
from cc_ds.transform.sample import sample_pairs


def row(lang: str, text: str, english: str | None) -> Row:
    def turn(content):
        return [{"role": "user", "content": content}]

    return Row(turn(text), "", english and turn(english), lang, "test")


def parallel(langs: list[str], prompts: int) -> list[Row]:
    return [row(lang, f"{lang} {i}", f"en {i}") for lang in langs for i in range(prompts)]


def english(rows, indices):
    return {rows[i].prompt_en[0]["content"] for i in indices}


@pytest.mark.parametrize("prompts", [12, 400])
def test_split_shares_no_english_prompt_and_is_balanced(prompts):
    rows = parallel(["sw", "yo", "tr", "de"], prompts)
    num_pairs = min(200, len(rows))
    fit, out = sample_pairs(rows, num_pairs, 0.1, seed=0)
    assert len(fit) + len(out) == len(set(fit + out)) == num_pairs
    assert not english(rows, fit) & english(rows, out)
    counts = Counter(rows[i].lang for i in fit + out)
    assert max(counts.values()) - min(counts.values()) <= 1
    held = Counter(rows[i].lang for i in out)
    assert set(held) == {"sw", "yo", "tr", "de"}
    assert len(out) == pytest.approx(0.1 * num_pairs, abs=4)


def test_few_pairs_of_many_languages_keep_the_share():
    rows = [row(f"l{n}", f"{n} {i}", f"en {n} {i}") for n in range(9) for i in range(10)]
    fit, out = sample_pairs(rows, 20, 0.1, seed=0)
    assert (len(fit), len(out)) == (18, 2)
    assert len(sample_pairs(rows, 4, 0.01, seed=0)[1]) == 1


def test_seeded():
    rows = parallel(["sw", "yo"], 300)
    assert sample_pairs(rows, 100, 0.2, seed=1) == sample_pairs(rows, 100, 0.2, seed=1)
    assert sample_pairs(rows, 100, 0.2, seed=1) != sample_pairs(rows, 100, 0.2, seed=2)


def test_a_small_language_gives_all_it_has():
    rows = parallel(["sw"], 100) + [row("yo", f"yo {i}", f"other {i}") for i in range(5)]
    fit, out = sample_pairs(rows, 60, 0.1, seed=0)
    assert Counter(rows[i].lang for i in fit + out) == {"sw": 55, "yo": 5}


def test_rows_that_teach_nothing_are_left_out():
    rows = [
        row("sw", "swali", "question"),
        row("sw", "swali", "question"),
        row("sw", "bila", None),
        row("en", "question", "question"),
        row("sw", "jingine", "another"),
    ]
    fit, out = sample_pairs(rows, 10, 0.0, seed=0)
    assert sorted(fit) == [0, 4] and out == []
    with pytest.raises(ValueError, match="none of the 2 rows is a pair"):
        sample_pairs(rows[2:4], 10, 0.1, seed=0)


def test_errors():
    rows = [row(lang, lang, "the one question") for lang in ("sw", "yo")]
    with pytest.raises(ValueError, match="share one English prompt"):
        sample_pairs(rows, 10, 0.1, seed=0)
    for num_pairs, held_out in ((0, 0.1), (10, 1.0), (10, -0.1)):
        with pytest.raises(ValueError, match="num_pairs must be"):
            sample_pairs(rows, num_pairs, held_out, seed=0)
