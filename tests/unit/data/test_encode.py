"""Labels cover the response and its end-of-turn and nothing else; truncation keeps anchors, BOS and some response."""

from __future__ import annotations

import random

import pytest

from cc_ds.data import BadRow, Row, load_template, tokenise_row
from cc_ds.data.encode import check_limits, response_reserve
from cc_ds.data.pairs import LongRow
from cc_ds.data.templates import BUILT_IN


def user(text):
    return [{"role": "user", "content": text}]


ROW = Row(
    user("Je, mji mkuu wa Kenya ni upi?"), "Nairobi.", user("What is the capital of Kenya?"), "sw", "rows.jsonl:3"
)


@pytest.fixture(params=["bpe", "llama"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", BUILT_IN)
def test_labels_cover_response_and_end_of_turn(tokenizer, name):
    template = load_template(tokenizer, name)
    row = tokenise_row(ROW, template, 512, 512)
    prompt = template.render_prompt(ROW.prompt).ids
    labelled = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(labelled).strip() == "Nairobi." + tokenizer.decode(template.end_of_turn_ids)
    assert labelled == template.render_response("Nairobi.")
    assert row["input_ids"] == prompt + labelled
    assert row["labels"] == [-100] * len(prompt) + labelled
    assert row["anchor"] == len(prompt) - 1
    english = template.render_prompt(ROW.prompt_en)
    assert (row["english_input_ids"], row["english_anchor"]) == (english.ids, english.anchor)
    assert (row["lang"], row["source"]) == ("sw", "rows.jsonl:3")
    assert not (row["prompt_cut"] or row["response_cut"] or row["english_cut"])


def test_only_the_last_turn_is_labelled(bpe):
    template = load_template(bpe, "chatml")
    talk = [*user("A?"), {"role": "assistant", "content": "B."}, *user("C?")]
    row = tokenise_row(Row(talk, "D.", None, "sw", "f:1"), template, 512, 512)
    assert bpe.decode([token for token in row["labels"] if token != -100]) == "D.<|im_end|>"
    assert bpe.decode(row["input_ids"]).endswith(
        "B.<|im_end|>\n<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\nD.<|im_end|>"
    )


def test_rows_without_english(bpe):
    row = tokenise_row(Row(ROW.prompt, "B", None, "en", "f:1"), load_template(bpe, "chatml"), 512, 512)
    assert (row["english_input_ids"], row["english_anchor"], row["english_cut"]) == ([], 0, False)


@pytest.mark.parametrize("name", ["chatml", "mistral", "plain"])
def test_truncation_over_many_lengths(tokenizer, name):
    template = load_template(tokenizer, name)
    shortest = template.shortest_prompt_length()
    draw = random.Random(0)
    words = ["Kenya", "ni", "mji", "mkuu", "heißt", "🙂", "\n"]
    seen = set()
    for _ in range(150):
        question, answer, english = (" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(3))
        max_length, max_english = draw.randint(2 * shortest, 200), draw.randint(shortest, 120)
        check_limits(template, max_length, max_english, "truncate")
        row = tokenise_row(
            Row(user(question), answer + "x", user(english), "sw", "f:1"), template, max_length, max_english
        )
        prompt, whole = template.render_prompt(user(question)).ids, template.render_response(answer + "x")
        kept, response = row["input_ids"][: row["anchor"] + 1], row["input_ids"][row["anchor"] + 1 :]
        tail = len(kept) - (template.bos_id is not None)

        assert len(row["input_ids"]) == len(row["labels"]) <= max_length
        assert row["labels"] == [-100] * len(kept) + response
        assert kept[-tail:] == prompt[-tail:]  # the anchor is the prompt's last token, generation prompt and all
        assert kept[0] == prompt[0]  # BOS
        assert len(kept) >= shortest - 1 or len(kept) == len(prompt)
        assert len(response) >= min(len(whole), response_reserve(max_length)) - len(template.end_of_turn_ids)
        assert len(response) >= 1
        assert response == whole[: len(response)]
        ends = response[-len(template.end_of_turn_ids) :] == template.end_of_turn_ids
        assert ends == (not row["response_cut"]) == (len(response) == len(whole))
        assert row["prompt_cut"] == (len(kept) < len(prompt))
        if row["prompt_cut"] or row["response_cut"]:
            assert len(prompt) + len(whole) > max_length
            assert len(row["input_ids"]) >= max_length - len(template.end_of_turn_ids)
        if row["prompt_cut"]:
            assert len(response) >= min(len(whole) - 1, response_reserve(max_length))

        whole_english = template.render_prompt(user(english)).ids
        assert len(row["english_input_ids"]) == min(len(whole_english), max_english)
        assert row["english_input_ids"][0] == whole_english[0]
        assert row["english_input_ids"][2:] == whole_english[-len(row["english_input_ids"]) :][2:]
        assert row["english_anchor"] == len(row["english_input_ids"]) - 1
        assert row["english_cut"] == (len(whole_english) > max_english)
        seen.add((row["prompt_cut"], row["response_cut"], row["english_cut"]))
    assert {(p, r) for p, r, _ in seen} == {(False, False), (True, False), (False, True), (True, True)}
    assert {e for _, _, e in seen} == {True, False}


def test_a_bos_that_only_the_template_writes_survives_truncation(make_bpe):
    tokenizer = make_bpe(bos=False)
    tokenizer.bos_token = "<|bos|>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    row = tokenise_row(Row(user("Kenya " * 50), "B", user("K " * 50), "sw", "f:1"), load_template(tokenizer), 20, 20)
    assert row["prompt_cut"] and row["english_cut"]
    assert row["input_ids"][0] == row["english_input_ids"][0] == tokenizer.bos_token_id


def test_no_part_of_a_longer_end_of_turn_is_left(make_bpe):
    tokenizer = make_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n----<|im_end|>' }}{% endfor %}"
    template = load_template(tokenizer)
    assert len(template.end_of_turn_ids) > 3
    row = Row(user("A"), "Nairobi is the capital of Kenya.", None, "sw", "f:1")
    whole = tokenise_row(row, template, 512, 512)
    text = template.encode_response(row.response)
    for less in range(1, len(template.end_of_turn_ids) + 1):
        cut = tokenise_row(row, template, len(whole["input_ids"]) - less, 512)
        assert cut["response_cut"]
        assert cut["input_ids"][cut["anchor"] + 1 :] == text


def test_english_is_cut_by_its_own_limit(bpe):
    """A long target prompt takes nothing from the English one."""
    template = load_template(bpe, "chatml")
    row = tokenise_row(Row(user("Kenya " * 300), "B", ROW.prompt_en, "sw", "f:1"), template, 64, 64)
    assert row["prompt_cut"]
    assert row["english_input_ids"] == template.render_prompt(ROW.prompt_en).ids


def test_long_rows_skipped_or_refused(bpe):
    template = load_template(bpe, "chatml")
    long = Row(user("Kenya " * 100), "B", user("K " * 100), "sw", "rows.jsonl:9")
    assert isinstance(tokenise_row(long, template, 40, 512, "skip"), LongRow)
    assert isinstance(tokenise_row(long, template, 2048, 40, "skip"), LongRow)
    assert isinstance(tokenise_row(long, template, 2048, 512, "skip"), dict)
    with pytest.raises(
        ValueError, match=r"rows.jsonl:9: prompt \(\d+ tokens\) and response \(\d+\) exceed max_length 40"
    ):
        tokenise_row(long, template, 40, 512, "error")
    with pytest.raises(
        ValueError, match=r"rows.jsonl:9: the English prompt \(\d+ tokens\) exceeds max_english_length 40"
    ):
        tokenise_row(long, template, 2048, 40, "error")


def test_limits_that_leave_no_room(bpe):
    template = load_template(bpe, "chatml")
    shortest = template.shortest_prompt_length()
    for limits, message in [
        ((shortest, 512, "truncate"), f"max_length {shortest} is too small"),
        ((512, shortest - 1, "truncate"), "max_english_length .* is too small"),
        ((512, 512, "cut"), "on_long must be one of truncate, error, skip"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_limits(template, *limits)


def test_thoughts_apart_are_trained_or_refused(make_bpe):
    tokenizer = make_bpe()
    row = Row(user("A"), "Four.", None, "sw", "f:4", "2+2")
    bad = tokenise_row(row, load_template(tokenizer, "chatml"), 512, 512)
    assert isinstance(bad, BadRow) and "does not write the reasoning_content" in bad.reason
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['reasoning_content'] %}{{ '(' + m['reasoning_content'] + ')' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    labels = tokenise_row(row, load_template(tokenizer), 512, 512)["labels"]
    assert tokenizer.decode([token for token in labels if token != -100]) == "(2+2)Four.<|im_end|>"


def test_rows_that_the_template_refuses_or_that_hold_a_stop_token(make_bpe):
    tokenizer = make_bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    template = load_template(tokenizer)
    system = [{"role": "system", "content": "S"}, *user("A")]
    for row in (Row(system, "B", None, "sw", "f:4"), Row(user("A"), "B", system, "sw", "f:4")):
        bad = tokenise_row(row, template, 512, 512)
        assert bad.source == "f:4" and bad.reason.startswith(
            "the chat template rejects the conversation: TemplateError: no system role; a built-in one joins it to the"
        )
    bad = tokenise_row(Row(user("A"), "B<|im_end|> C", None, "sw", "f:4"), template, 512, 512)
    assert isinstance(bad, BadRow)
    assert "stop token" in bad.reason
