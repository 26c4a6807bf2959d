"""Scores of one response against values computed by hand, and ROUGE-L against Google's package."""

from __future__ import annotations

import random

import pytest

from cc_ds.eval import metrics
from cc_ds.eval.metrics import Reference, chosen_option

XNLI = {"1": "Entail", "2": "Neutral", "3": "Contradict"}
MMMLU = {"A": "0", "B": "Four dogs", "C": "two", "D": "six"}


def score(metric: str, response: str, *answers: str, lang: str = "en") -> float:
    return metrics.METRICS[metric](response, Reference(answers=answers, lang=lang))


def test_exact_match_takes_any_accepted_answer():
    assert score("exact_match", "PARIS.", "Lutetia", "paris")
    assert not score("exact_match", "Paris is the capital", "Paris")
    assert not score("exact_match", "30", "3.0")
    assert not score("exact_match", "", "Paris")
    assert not score("exact_match", " . ", "Paris")
    assert score("exact_match", "%", "%")


def test_inclusion_allows_affixes_but_not_parts_of_numbers():
    assert score("inclusion", "The capital is Paris.", "paris")
    assert score("inclusion", "서울은 한국의 수도", "서울")
    assert score("inclusion", "答えは東京です", "東京")
    assert score("inclusion", "The answer is (B).", "B")
    assert not score("inclusion", "Berlin", "B")
    assert score("inclusion", "in 1937", "1937")
    assert not score("inclusion", "in 1937", "3", "93")
    assert not score("inclusion", "3.5 km", "3")
    assert not score("inclusion", "1.5 km", "5")
    assert score("inclusion", "3 km", "3")
    assert not score("inclusion", "", "a")
    assert score("inclusion", "الإجابة ٣", "3", lang="ar") and not score("inclusion", "१९३७", "3", lang="hi")
    assert score("inclusion", "made in the USA.", "USA") and not score("inclusion", "a sofa", "of")
    assert not score("inclusion", "Bẹ́ẹ̀ni", "b") and not score("inclusion", "época", "poc")
    assert score("inclusion", "USA는", "usa")


def test_yes_and_no_are_what_is_said_first_and_not_letters_of_a_word():
    assert score("inclusion", "Nein.", "no", lang="de") and not score("inclusion", "Ja.", "no", lang="de")
    assert not score("inclusion", "I don't know", "no") and not score("inclusion", "Yes, there is no other", "no")
    assert score("inclusion", "是的", "yes", lang="zh") and not score("inclusion", "不是", "yes", lang="zh")
    assert not score("inclusion", "Нет, никогда", "yes", "да", lang="ru")


@pytest.mark.parametrize(
    ("lang", "response", "answer", "em", "f1"),
    [
        ("en", "the Denver Broncos", "Denver Broncos!", 1, 1),
        ("en", "It was Denver", "Denver Broncos", 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("en", "dog dog dog", "dog", 0, 0.5),  # counted as often as both have it
        ("de", "Die Donau", "donau", 1, 1),
        ("zh", "是东京。", "东京", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("th", "สี่ครั้ง", "สี่", 0, 2 * (1 / 4) * 1 / (1 / 4 + 1)),  # สี่ | ค รั้ ง
        ("en", "", "Denver", 0, 0),
        ("en", "!!", "Denver", 0, 0),
    ],
)
def test_squad(lang, response, answer, em, f1):
    assert score("squad_em", response, answer, lang=lang) == em
    assert score("f1", response, answer, lang=lang) == pytest.approx(f1)


def test_squad_takes_the_best_answer():
    assert score("f1", "Denver Broncos", "Carolina Panthers", "the Broncos") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("lang", "response", "answer", "expected"),
    [
        ("en", "the cat sat on the mat", "the dog sat on a mat", 8 / 12),  # the sat on mat: 4 of 6 and 6
        ("en", "mat the on", "the on mat", 4 / 6),
        ("en", "dog", "dog dog", 2 / 3),  # one token pairs with one
        ("zh", "北京是首都", "首都是北京", 2 * 2 / 10),  # 北京, or 首都
        ("ja", "東京へ行った", "東京に行く", 2 * 3 / 11),  # 東 京 行
        ("th", "ไปที่นี่", "ไปนี่", 2 * 3 / 7),  # ไ ป (ที่) นี่
        ("ar", "القط نام", "نام القط", 0.5),
        ("en", "", "word", 0),
    ],
)
def test_rouge_l(lang, response, answer, expected):
    assert score("rouge_l", response, answer, lang=lang) == pytest.approx(expected)


def test_rouge_l_equals_googles():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    google = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(0)
    for _ in range(50):
        response, answer = (
            " ".join(
                draw.choices(
                    ["a", "B,", "cat", "dog.", "e-mail", "it's", "£3.5m", "$20", "1,000", "a_b+c", "%"],
                    k=draw.randint(1, 12),
                )
            )
            for _ in "ab"
        )
        assert score("rouge_l", response, answer) == pytest.approx(google.score(answer, response)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("response", "key"),
    [
        ("2", "2"),
        ("(2) Neutral", "2"),
        ("2. Neutral", "2"),
        ("The answer is (3), not 1", "3"),
        ("答案是2。", "2"),
        ("الإجابة: ٢", "2"),
        ("उत्तर १ है", "1"),
        ("Neutral", "2"),
        ("It is a contradiction: they contradict each other", "3"),
        ("Entail or neutral", None),
        ("12", None),
        ("1.5", None),
        ("In 2015 nothing happened", None),
        ("Cevap 2'dir.", "2"),
        ("Doğru seçenek 1'dir, çünkü", "1"),
        ("<answer>2</answer>", "2"),
        ("2</answer>", "2"),
        ("2 = both", "2"),
        ("2 = 1 + 1", None),
        ("", None),
        ("no idea", None),
    ],
)
def test_chosen_number(response, key):
    assert chosen_option(response, XNLI) == key


@pytest.mark.parametrize(
    ("response", "key"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("B) four", "B"),
        ("**C**", "C"),
        ("C\nbecause A is wrong", "C"),
        ("The answer is D", "D"),
        ("A good answer is B", "B"),
        ("A is correct", "A"),
        ("正确答案是B", "B"),
        ("Berlin", None),
        ("four dogs", "B"),
        ("(A) 0", "A"),
        ("Answer = B", "B"),
        ("Answer is B's", "B"),
        ("B</s>", "B"),
        ("A\nbecause it is", "A"),
        ("A\n\nporque es la capital", "A"),
        ("A because it is", "A"),
        ("A+B", None),
        ("A + B", None),
        ("A = l x w", "A"),
        ("A = l * w", None),
        ("D'une ville", None),
    ],
)
def test_chosen_letter(response, key):
    assert chosen_option(response, MMMLU) == key


LIGHT = {"A": "Dímeros de timina", "B": "d+3=9", "C": "A lua, vista da Terra", "D": "A direct leak", "E": "leak"}


@pytest.mark.parametrize(
    ("response", "key"),
    [
        ("Dímeros de timina", "A"),
        ("d+3=9", "B"),
        ("A lua, vista da Terra.", "C"),
        ("A direct leak", "D"),
        ("It is a direct leak", "D"),
        ("A única opção correta é C", "C"),
        ("A última", None),
        ("Dímeros", None),
        ("Bẹ́ẹ̀ni, D", "D"),
        ("B\u0300 ni", None),  # a letter with a combining mark
        ("A é a correta", "A"),
        ("A ni jibu sahihi", "A"),
        ("A+B", None),
        ("B'de", "B"),
        ("D-dimer", None),
        ("D - leak", "D"),
        ("E", "E"),
    ],
)
def test_a_key_is_no_letter_of_a_word_and_an_options_own_text_names_it(response, key):
    assert chosen_option(response, LIGHT) == key


def test_an_options_text_as_it_is_written_comes_before_what_it_is_normalised_to():
    options = {"A": "(0, 1)", "B": "[0, 1]", "C": "i", "D": "-i"}
    assert [chosen_option(text, options) for text in ("(0, 1)", "[0, 1]", "i.", "-i", "0, 1")] == [*"ABCD", None]
    assert chosen_option("C", {"A": "L", "B": "C", "C": "R"}) == "C", "a key is a key"


def test_choice_and_no_options():
    assert metrics.choice("(2)", Reference(answers=("2",), options=XNLI)) == 1
    assert metrics.choice("(1)", Reference(answers=("2",), options=XNLI)) == 0
    assert metrics.choice("", Reference(answers=("2",), options=XNLI)) == 0
    assert chosen_option("2", {}) is None


@pytest.mark.parametrize("metric", sorted(metrics.METRICS))
def test_an_empty_response_scores_zero(metric):
    reference = Reference(answers=("1",), lang="en", options=XNLI)
    assert metrics.METRICS[metric]("", reference) == 0
