"""One row to token ids: prompt, response and labels, the anchors, and what to do with rows that are too long.

    input_ids  [ prompt ............ anchor | response ... end-of-turn ]
    labels     [ -100 ................ -100 | response ... end-of-turn ]

Truncation never moves an anchor off the last prompt token: prompts lose their beginning (after BOS), responses their
end.
"""

from __future__ import annotations

from typing import Any

from cc_ds.data.pairs import BadRow, LongRow, Row
from cc_ds.data.templates import Template, TemplateRejects

IGNORED = -100
ON_LONG = ("truncate", "error", "skip")


def check_limits(template: Template, max_length: int, max_english_length: int, on_long: str) -> None:
    """Raise ValueError for limits under which a prompt could lose its generation prompt, and for an unknown
    `on_long`."""
    if on_long not in ON_LONG:
        raise ValueError(f"on_long must be one of {', '.join(ON_LONG)}, not {on_long!r}.")
    shortest = template.shortest_prompt_length()
    if max_length - response_reserve(max_length) < shortest:
        raise ValueError(
            f"max_length {max_length} is too small: the chat template alone takes {shortest} tokens of a prompt, and a "
            "quarter of max_length is kept for the response."
        )
    if max_english_length < shortest:
        raise ValueError(
            f"max_english_length {max_english_length} is too small: the chat template alone takes {shortest} tokens."
        )


def response_reserve(max_length: int) -> int:
    """Tokens of `max_length` that a long prompt must leave to the response (a shorter response takes only its own
    length)."""
    return max(1, max_length // 4)


def tokenise_row(
    row: Row, template: Template, max_length: int, max_english_length: int, on_long: str = "truncate"
) -> dict[str, Any] | BadRow:
    """Tokenise one row.

    Returns a dict of
        input_ids, labels        lists of at most `max_length` ints; labels are -100 on the prompt
        anchor                   index of the last prompt token in input_ids
        english_input_ids        list of at most `max_english_length` ints; empty for a plain SFT row
        english_anchor           its last index; 0 for a plain SFT row
        lang, source             as in the row
        prompt_cut, response_cut, english_cut    whether truncation touched them; a cut response has no end-of-turn
    or a BadRow where the template refuses the row or the response would end in the middle, or, with on_long "skip", a
    LongRow. Raises ValueError naming the row if it is too long and `on_long` is "error".
    """
    try:
        prompt = template.render_prompt(row.prompt).ids
        english = [] if row.prompt_en is None else template.render_prompt(row.prompt_en).ids
        text = template.encode_response(row.response, row.reasoning_content, row.prompt)
    except TemplateRejects as error:
        remedy = (
            "; a built-in one joins it to the first question (--chat_template)"
            if "system" in str(error).lower()
            else ""
        )
        return BadRow(row.source, f"the chat template rejects the conversation: {error}{remedy}")
    if not text:
        return BadRow(row.source, "the response has no tokens")
    if any(token in template.stop_token_ids for token in text):
        return BadRow(row.source, "the response contains a stop token as text; the end of turn is added by itself")
    response = text + template.end_of_turn_ids

    excess = _excess(len(prompt), len(response), len(english), max_length, max_english_length)
    if excess and on_long == "skip":
        return LongRow(row.source, "longer than the limits", excess)
    if excess and on_long == "error":
        raise ValueError(f'{row.source}: {excess}. Raise the limit, or set on_long to "truncate" or "skip".')

    kept_prompt = _keep_end(prompt, max_length - min(len(response), response_reserve(max_length)), template.bos_id)
    room = max_length - len(kept_prompt)
    kept_response = response if len(response) <= room else text[:room]
    kept_english = _keep_end(english, max_english_length, template.bos_id)
    return {
        "input_ids": kept_prompt + kept_response,
        "labels": [IGNORED] * len(kept_prompt) + kept_response,
        "anchor": len(kept_prompt) - 1,
        "english_input_ids": kept_english,
        "english_anchor": max(0, len(kept_english) - 1),
        "lang": row.lang,
        "source": row.source,
        "prompt_cut": len(kept_prompt) < len(prompt),
        "response_cut": len(kept_response) < len(response),
        "english_cut": len(kept_english) < len(english),
    }


def _keep_end(prompt: list[int], room: int, bos_id: int | None) -> list[int]:
    """The prompt's last `room` tokens, BOS still in front."""
    if len(prompt) <= room:
        return prompt
    if bos_id is None:
        return prompt[-room:]
    assert room >= 2, "check_limits guards the smallest room"
    return [bos_id, *prompt[1 - room :]]


def _excess(prompt: int, response: int, english: int, max_length: int, max_english_length: int) -> str:
    if prompt + response > max_length:
        return f"prompt ({prompt} tokens) and response ({response}) exceed max_length {max_length}"
    if english > max_english_length:
        return f"the English prompt ({english} tokens) exceeds max_english_length {max_english_length}"
    return ""
