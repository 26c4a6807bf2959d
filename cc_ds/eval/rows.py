"""One question of an evaluation: the prompt, the accepted answers, and an id that is the same in every run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One question."""

    prompt: list[dict[str, str]]
    """Messages, ending with the user's."""
    answers: tuple[str, ...]
    """Each counts as right; at least one, none empty. Of a multiple choice: the right key."""
    lang: str
    """Language of the prompt."""
    prompt_en: list[dict[str, str]] | None
    """The same prompt in English, for the upper bound."""
    where: str
    """File and row, for messages."""
    item: str = ""
    """The same for the same question in every language; empty: no other row asks it."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of a multiple choice: key -> text."""

    @property
    def id(self) -> str:
        """Digest of language and prompts: the same row in another run, order or file has the same id."""
        content = json.dumps([self.lang, self.prompt, self.prompt_en], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def options_of(prompt: str, keys: str) -> dict[str, str]:
    """Key -> text of the options that a prompt lists in lines "(key) text"; "" for a key it does not list.

    Where several lines open with a key, the last run counts: the question may hold the others.
    """
    options = dict.fromkeys(keys, "")
    for key in keys:
        found = re.findall(rf"^\({key}\) ?(.*)$", prompt, re.MULTILINE)
        if found:
            options[key] = found[-1].strip()
    return options
