"""Choose the pairs a Transform Matrix is fitted on, and those it is judged on.

Rows with a target and an English prompt go in; two lists come out that share no English prompt, balanced over the
languages, the same for the same seed.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cc_ds.data.pairs import Row

logger = logging.getLogger(__name__)


def sample_pairs(rows: Sequence[Row], num_pairs: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of `rows` to fit on and to hold out, `num_pairs` in all or as many as there are.

    `held_out` is the share held out, 0 <= held_out < 1, of every language as nearly as English prompts that several
    languages share allow; all rows of one English prompt fall on one side. Rows without an English prompt, or whose
    prompt is the English one itself, teach nothing and are left out, as are repetitions. ValueError: a share or
    number out of range, no usable rows, or one English prompt alone with held_out above 0.
    """
    if num_pairs < 1 or not 0 <= held_out < 1:
        raise ValueError(f"num_pairs must be at least 1 and 0 <= held_out < 1, got {num_pairs} and {held_out}")
    usable = _usable(rows)
    rng = random.Random(seed)
    chosen = _balanced(rows, usable, num_pairs, rng)
    fit, out = split_by_english(rows, chosen, held_out, rng)
    if not fit:
        raise ValueError(
            f"all {len(chosen)} pairs share one English prompt, so none can be held out; add pairs, or pass held_out 0"
        )
    return fit, out


def split_by_english(
    rows: Sequence[Row], chosen: Sequence[int], share: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Split indices of `rows` into the rest and a share of every language that has no English prompt in common with it.

    A share above 0 takes one English prompt at least, so the rest can be empty.
    """
    groups = defaultdict(list)
    for index in chosen:
        groups[_text(rows[index].prompt_en)].append(index)
    order = sorted(groups)
    rng.shuffle(order)
    out = _held_out(rows, [groups[key] for key in order], share)
    return [index for index in chosen if index not in out], [index for index in chosen if index in out]


def _usable(rows: Sequence[Row]) -> list[int]:
    seen: set[tuple[str, str]] = set()
    usable = []
    for index, row in enumerate(rows):
        if row.prompt_en is None:
            continue
        pair = (_text(row.prompt), _text(row.prompt_en))
        if pair[0] != pair[1] and pair not in seen:
            usable.append(index)
            seen.add(pair)
    if not usable:
        raise ValueError(
            f"none of the {len(rows)} rows is a pair: each needs a prompt and its English version "
            "(instruction and instruction_en, prompt and prompt_en, or messages and messages_en)"
        )
    if len(usable) < len(rows):
        logger.info("%d of %d rows have no English prompt, are English, or repeat", len(rows) - len(usable), len(rows))
    return usable


def _balanced(rows: Sequence[Row], usable: list[int], num_pairs: int, rng: random.Random) -> list[int]:
    """Random rows, one of each language in turn until there are enough; a language that runs out drops out."""
    by_lang = defaultdict(list)
    for index in usable:
        by_lang[rows[index].lang or ""].append(index)
    piles = [by_lang[lang] for lang in sorted(by_lang)]
    for pile in piles:
        rng.shuffle(pile)
    # With fewer pairs than languages, which languages come first is drawn too.
    rng.shuffle(piles)
    turns = [pile[turn] for turn in range(max(map(len, piles))) for pile in piles if turn < len(pile)]
    return turns[:num_pairs]


def _held_out(rows: Sequence[Row], groups: list[list[int]], share: float) -> set[int]:
    """Whole groups of one English prompt until each language has its share; one that mostly overshoots is passed over.

    A share above 0 holds out one group at least, the smallest if need be.
    """
    counts = Counter(rows[index].lang for group in groups for index in group)
    missing = {lang: int(share * count) for lang, count in counts.items()}
    total = max(1, round(share * counts.total())) if share > 0 else 0
    # What rounding down left over goes to the languages that lost most by it.
    by_loss = sorted(counts, key=lambda lang: missing[lang] - share * counts[lang])
    for lang in by_loss[: max(0, total - sum(missing.values()))]:
        missing[lang] += 1
    out: set[int] = set()
    for group in groups:
        if 2 * sum(missing[rows[index].lang] > 0 for index in group) > len(group):
            out.update(group)
            for index in group:
                missing[rows[index].lang] -= 1
    return out or (set(min(groups, key=len)) if share > 0 else set())


def _text(messages: list[dict]) -> str:
    return json.dumps(messages, sort_keys=True, ensure_ascii=False)
