"""Text as scores see it, in any script: normalised, cut into tokens, and an answer's other spellings.

`normalise` serves short answers of any task; `answer_words` follows the scripts of SQuAD and MLQA (punctuation deleted,
articles of the language dropped); `words` serves ROUGE. A digit is the same in every script. Scripts written without
spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are cut into characters: a letter with its marks. A dictionary
would cut them into words, but each of its versions would give other scores; characters are what MLQA's own script takes
for Chinese.
"""

from __future__ import annotations

import datetime
import re
import string
import unicodedata
from bisect import bisect_right
from functools import cache

# First and last code point of scripts written without spaces, ascending.
_UNSPACED = [
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # Han repetition marks, zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
]
_STARTS = [first for first, _ in _UNSPACED]
_SEPARATORS = {0x066B: ".", 0x066C: ","}  # Arabic's

# As MLQA (Lewis et al. 2020) drops them (ar, de, en, es, vi; zh and hi have none), and MKQA for fr and pt.
_ARTICLES = {
    "de": "ein eine einen einem eines einer der die das den dem des",
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "fr": "le la l les du de d des un une",
    "pt": "o a os as um uma uns umas",
    "vi": "của là cái chiếc những",
}
# How people say yes and no, in MKQA's languages. MKQA's answers are "yes" and "no" in all of them.
_YES_NO = {
    "ar": ("نعم أجل بلى", "لا كلا"),
    "de": ("ja jawohl", "nein"),
    "en": ("yes", "no"),
    "ja": ("はい ええ そうです", "いいえ いや 違います"),
    "ko": ("네 예 맞습니다", "아니요 아니오 아니 아닙니다"),
    "pt": ("sim", "não"),
    "ru": ("да", "нет"),
    "tr": ("evet", "hayır"),
    "vi": ("có vâng đúng phải", "không"),
    "zh": ("是的 是 对 没错 不错", "不是 不 否 没有 没"),
}
# Chinese and Japanese have no spaces to stand between. There the words count where a clause begins. Replaced before:
# what holds 是, 对, 不 or はい and says neither, other ways to say either, and "the answer is".
_CLAUSES = {
    "ja": {"とはいえ": "", "答えは": " ", "回答は": " "},
    "zh": {"是否定": " 否 ", "是肯定": " 是 ", "是否": "", "是不是": "", "对不对": "", "有没有": "", "对不起": "",
           "不好意思": "", "对于": "", "答案是": " ", "答案为": " ", "回答是": " ", "回答为": " "},
}  # fmt: skip
_ARABIC_ARTICLE = re.compile(r"(?<!\S)ال(?=\S)")


def normalise(text: str) -> str:
    """NFKC, casefold, punctuation and outer whitespace stripped, inner whitespace collapsed to one space.

    Punctuation inside a text separates words ("rock'n'roll" -> "rock n roll"), except where it is part of a number:
    between two digits ("3.0", "10:30") or as a minus sign ("-5"). Invisible format characters (zero-width joiners,
    direction marks) go. A text of punctuation alone ("%") stays as it is, so that it can be an answer.
    """
    folded = _fold(text).replace("\u2212", "-").strip()
    kept = []
    for place, char in enumerate(folded):
        before, after = folded[place - 1 : place], folded[place + 1 : place + 2]
        keep = not _is_punctuation(char) or _in_number(before, char, after)
        kept.append(char if keep else " ")
    return " ".join("".join(kept).split()) or " ".join(folded.split())


def words(text: str) -> list[str]:
    """Tokens as rouge_score cuts them, in any script: runs of letters and digits in lower case, nothing else.

    Characters where the script has no spaces; marks belong to their letter.
    """
    bare = "".join(char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in _fold(text))
    return [token for word in bare.split() for token in _cut(word)]


def answer_words(text: str, lang: str) -> list[str]:
    """Tokens as SQuAD and MLQA compare answers: lower case, punctuation deleted, articles of `lang` dropped.

    A text that has nothing else ("The", "%") keeps what it has.
    """
    folded = _fold(text)
    # SQuAD deletes ASCII's symbols ("$", "+") with its punctuation.
    deleted = {char for char in folded if _is_punctuation(char) or char in string.punctuation}
    bare = "".join(char for char in folded if char not in deleted).strip() or folded
    articles = _ARTICLES.get(lang, "").split()
    kept = [word for word in bare.split() if word not in articles] or bare.split()
    if lang == "ar":
        kept = [_ARABIC_ARTICLE.sub("", word) for word in kept]
    return [token for word in kept for token in _cut(word)]


def spellings(answer: str, lang: str) -> list[str]:
    """The answer and other ways to write it: whole numbers without ".0", thousands separated, dates in words, yes and
    no in the language.

    MKQA writes every number as a float ("3.0"), every date as "2019-06-30", and "yes" and "no" in all languages;
    people, and models, do not. Dates are spelt by CLDR in `lang`, and left alone in a language it does not have.
    """
    found = [answer]
    if answer in ("yes", "no") and lang in _YES_NO:
        found += _YES_NO[lang][answer == "no"].split()
    if match := re.fullmatch(r"(-?)(\d+)\.0(\D.*)?", answer.strip()):
        sign, digits, unit = match.group(1), match.group(2), match.group(3) or ""
        found.append(f"{sign}{digits}{unit}")
        if len(digits) > 3:
            grouped = f"{int(digits):,}"
            found += [f"{sign}{grouped.replace(',', mark)}{unit}" for mark in (",", ".", " ")]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", answer.strip()):
        found += _dates(answer.strip(), lang)
    return list(dict.fromkeys(found))


def yes_or_no(text: str, lang: str, whole: bool = False) -> str | None:
    """ "yes" or "no": which the text says first in `lang`, or else in English; None: neither.

    `whole`: the text must be that word alone. Of languages other than MKQA's ten, only the English words are known.
    """
    for code in dict.fromkeys((lang, "en")):
        said = normalise(text)
        for phrase, meant in _CLAUSES.get(code, {}).items():
            said = said.replace(phrase, meant)
        said = " ".join(said.split())
        if pattern := _yes_no_pattern(code):
            if match := (pattern.fullmatch(said) if whole else pattern.search(said)):
                return match.lastgroup.partition("_")[0]
    return None


@cache
def _yes_no_pattern(lang: str) -> re.Pattern[str] | None:
    if lang not in _YES_NO:
        return None
    meanings = dict(zip(("yes", "no"), map(str.split, _YES_NO[lang])))
    words = {word: meaning for meaning, each in meanings.items() for word in each}
    longest_first = sorted(words, key=len, reverse=True)  # 没错 (right) is not 没
    either = "|".join(f"(?P<{words[word]}_{number}>{word})" for number, word in enumerate(longest_first))
    return re.compile(rf"(?<!\w)(?:{either})" + ("" if lang in _CLAUSES else r"(?!\w)"))


def _dates(iso: str, lang: str) -> list[str]:
    from babel import localedata
    from babel.dates import format_date

    try:
        day = datetime.date.fromisoformat(iso)
    except ValueError:  # 1999-00-00: a year alone, in MKQA's way
        return []
    if not localedata.exists(lang):
        return []
    return [format_date(day, pattern, locale=lang) for pattern in ("long", "medium", "d MMMM y")]


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return ascii_digits("".join(char for char in folded if unicodedata.category(char) != "Cf"))


def ascii_digits(text: str) -> str:
    """Decimal digits of every script as 0 to 9, and Arabic's separators in numbers as "." and ","."""
    return "".join(str(unicodedata.digit(char)) if char.isdecimal() else char for char in text).translate(_SEPARATORS)


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char).startswith("P")


def _in_number(before: str, char: str, after: str) -> bool:
    """Whether punctuation `char` between these neighbours ("" at an end) belongs to a number."""
    if not after.isdigit():
        return False
    return before.isdigit() or (char == "-" and (not before or before.isspace()))


def _cut(word: str) -> list[str]:
    """A word whole, except that each character of an unspaced script is a token of its own; marks join their letter."""
    tokens: list[str] = []
    alone = True  # the last token takes no more letters
    for char in word:
        if tokens and unicodedata.category(char).startswith("M"):
            tokens[-1] += char
            continue
        unspaced = _is_unspaced(char)
        if unspaced or alone:
            tokens.append(char)
        else:
            tokens[-1] += char
        alone = unspaced
    return tokens


def _is_unspaced(char: str) -> bool:
    place = bisect_right(_STARTS, ord(char)) - 1
    return place >= 0 and ord(char) <= _UNSPACED[place][1]
