"""Normalisation, tokens and other spellings, over scripts."""

from __future__ import annotations

import pytest

from cc_ds.eval.text import answer_words, normalise, spellings, words, yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Addis  Ababa.\n", "addis ababa"),
        ("Straße", "strasse"),
        ("「東京」。", "東京"),
        ("１２３", "123"),
        ("٣٫٥ و ۱۲", "3.5 و 12"),
        ("\u210co\u2115", "hon"),
        ("rock'n'roll", "rock n roll"),
        ("3.0", "3.0"),
        ("1,000.", "1,000"),
        ("10:30", "10:30"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("a-5", "a 5"),
        ("(B)", "b"),
        ("ما؟", "ما"),
        ("\u200fكابول\u200e", "كابول"),
        ("cafe\u0301", "caf\u00e9"),
        ("%", "%"),
        (" \n ", ""),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(normalise(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, sat.", ["the", "cat", "sat"]),
        ("東京は日本の首都です。", list("東京は日本の首都です")),
        ("他在2015年买了iPhone", ["他", "在", "2015", "年", "买", "了", "iphone"]),
        ("ที่นี่", ["ที่", "นี่"]),  # vowel and tone marks stay with their consonant
        ("สวัสดี ครับ", ["ส", "วั", "ส", "ดี", "ค", "รั", "บ"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("서울은 수도", ["서울은", "수도"]),
        ("£3.5m, 1,000_x", ["3", "5m", "1", "000", "x"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("lang", "text", "expected"),
    [
        ("en", "The U.S. and a dog's", ["us", "and", "dogs"]),
        ("de", "der Hund", ["hund"]),
        ("en", "der Hund", ["der", "hund"]),
        ("es", "La Paz", ["paz"]),
        ("ar", "القاهرة", ["قاهرة"]),
        ("ar", "مال", ["مال"]),
        ("zh", "《红楼梦》", ["红", "楼", "梦"]),
        ("en", "The", ["the"]),
        ("en", "%", ["%"]),
        ("en", "$20 + C^3 ~ a|b", ["20", "c3", "ab"]),
        ("en", "+", ["+"]),
        ("de", "€20", ["€20"]),
        ("vi", "những con mèo", ["con", "mèo"]),
        ("xx", "a b", ["a", "b"]),
    ],
)
def test_answer_words(lang, text, expected):
    assert answer_words(text, lang) == expected


@pytest.mark.parametrize(
    ("lang", "answer", "expected"),
    [
        ("en", "3.0", {"3.0", "3"}),
        ("de", "25.0 Episode", {"25.0 Episode", "25 Episode"}),
        ("en", "114194.0", {"114194.0", "114194", "114,194", "114.194", "114 194"}),
        ("en", "-2000.0", {"-2000.0", "-2000", "-2,000", "-2.000", "-2 000"}),
        ("en", "0.86 US dollars", {"0.86 US dollars"}),
        ("en", "1961-09-10", {"1961-09-10", "September 10, 1961", "Sep 10, 1961", "10 September 1961"}),
        ("und", "1961-09-10", {"1961-09-10"}),
        ("en", "1961-13-10", {"1961-13-10"}),
        ("en", "11-14", {"11-14"}),
        ("de", "no", {"no", "nein"}),
        ("sw", "no", {"no"}),
    ],
)
def test_spellings(lang, answer, expected):
    assert set(spellings(answer, lang)) == expected


@pytest.mark.parametrize(
    ("lang", "text", "expected"),
    [
        ("de", "Nein, das gibt es nicht.", "no"),
        ("de", "Yes.", "yes"),
        ("en", "Yes, there is no other", "yes"),
        ("en", "I don't know, nobody knows", None),
        ("pt", "No Brasil, sim", "yes"),
        ("ru", "когда", None),
        ("ru", "Нет", "no"),
        ("ar", "لا، لم يكن", "no"),
        ("ar", "الولادة", None),
        ("ko", "네덜란드", None),
        ("ko", "네, 있습니다", "yes"),
        ("ja", "いいえ、ありません", "no"),
        ("ja", "とはいえ、いいえ", "no"),
        ("ja", "答えははいです", "yes"),
        ("ja", "東京はいい所です", None),
        ("zh", "不是", "no"),
        ("zh", "答案是否定的", "no"),
        ("zh", "对于这个问题，答案是否定的。", "no"),
        ("zh", "是的，有", "yes"),
        ("zh", "答案是不。", "no"),
        ("zh", "答案是：没有", "no"),
        ("zh", "这个说法是错误的", None),
        ("zh", "他是否是总统：是的", "yes"),
        ("zh", "对不起，是的。", "yes"),
        ("zh", "没错", "yes"),
        ("tr", "Hayır", "no"),
        ("vi", "Không có", "no"),
        ("xx", "Nein", None),
    ],
)
def test_yes_and_no(lang, text, expected):
    assert yes_or_no(text, lang) == expected


def test_yes_and_no_alone():
    assert yes_or_no("Nein.", "de", whole=True) == "no" and yes_or_no("nein danke", "de", whole=True) is None


def test_dates_are_spelt_in_the_language():
    assert "10. September 1961" in spellings("1961-09-10", "de")
    assert "1961年9月10日" in spellings("1961-09-10", "ja")
