"""Scores for short answers in any language: exact match and inclusion after normalisation, and bootstrap intervals."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np


def normalise(text: str) -> str:
    """NFKC, casefold, punctuation and outer whitespace stripped, inner whitespace collapsed to one space.

    Punctuation inside a text separates words ("rock'n'roll" -> "rock n roll"), except where it is part of a number:
    between two digits ("3.0", "10:30") or as a minus sign ("-5"). Invisible format characters (zero-width joiners,
    direction marks) go. A text of punctuation alone ("%") stays as it is, so that it can be an answer.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = "".join(char for char in folded if unicodedata.category(char) != "Cf").replace("\u2212", "-").strip()
    kept = []
    for place, char in enumerate(folded):
        before, after = folded[place - 1 : place], folded[place + 1 : place + 2]
        keep = not unicodedata.category(char).startswith("P") or _in_number(before, char, after)
        kept.append(char if keep else " ")
    return " ".join("".join(kept).split()) or " ".join(folded.split())


def _in_number(before: str, char: str, after: str) -> bool:
    """Whether punctuation `char` between these neighbours ("" at an end) belongs to a number."""
    if not after.isdigit():
        return False
    return before.isdigit() or (char == "-" and (not before or before.isspace()))


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction equals a normalised accepted answer. An empty prediction never does."""
    predicted = normalise(prediction)
    return bool(predicted) and any(predicted == normalise(answer) for answer in answers)


def inclusion(prediction: str, answers: Sequence[str]) -> bool:
    """Whether one of the normalised accepted answers stands inside the normalised prediction.

    Affixes are allowed (Korean particles, Turkish and Swahili endings), as words are not split by spaces everywhere;
    but a number or a single Latin letter must not touch another letter or digit ("3" is not in "1937", nor "b" in
    "berlin").
    """
    predicted = normalise(prediction)
    return any(_stands_in(normalise(answer), predicted) for answer in answers)


def _stands_in(answer: str, text: str) -> bool:
    if not answer:
        return False
    if re.fullmatch(r"[a-z]|-?\d+(\D\d+)*", answer):
        return re.search(rf"(?<![a-z\d])(?<!\d[.,]){re.escape(answer)}(?![a-z\d]|[.,]\d)", text) is not None
    return answer in text


def bootstrap_interval(
    scores: Mapping[str, Sequence[float]], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the macro average: rows are redrawn within each group, groups weigh the same.

    `scores`: one list of row scores per group (language), none empty; a single group gives the interval of its mean.
    Rows count as independent: where groups hold translations of one item, the interval of the average is too narrow.
    The same seed gives the same interval.
    """
    if not scores or not all(len(values) for values in scores.values()):
        raise ValueError("a bootstrap interval needs at least one score in every group")
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in scores.values():
        array = np.asarray(values, dtype=np.float64)
        # One resample at a time: resamples x rows indices at once would not fit for large groups.
        means += [array[rng.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    means /= len(scores)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
