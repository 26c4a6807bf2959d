"""Four forms become one; columns are found, mapped or missed with a hint; bad rows are counted and named."""

from __future__ import annotations

import json

import pytest

from cc_ds.data import Row, Summary, read_rows


@pytest.fixture
def read(tmp_path):
    def read(*records, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_rows(path, **options)

    return read


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}


def test_instruction_form(read):
    rows, _ = read(
        {"instruction": "A", "input": "B", "output": "C", "instruction_en": "a", "input_en": "b", "lang": "sw"},
        {"instruction": "A", "output": "C", "instruction_en": "a"},
        {"instruction": "A", "input": None, "output": "C", "instruction_en": "", "input_en": "b"},
        {"instruction": "A", "output": "C", "lang": "en"},
    )
    prompts = [(row.prompt, row.prompt_en, row.lang) for row in rows]
    assert prompts == [
        ([user("A\nB")], [user("a\nb")], "sw"),
        ([user("A")], [user("a")], "und"),
        ([user("A")], None, "und"),
        ([user("A")], None, "en"),
    ]
    assert {row.response for row in rows} == {"C"}
    with pytest.raises(AttributeError):
        rows[0].lang = "de"


def test_system_and_history_of_an_instruction(read):
    """LLaMA-Factory's columns. One system text serves both prompts unless there is an English one."""
    record = {"instruction": "C", "output": "D", "instruction_en": "c", "system": "Be kind."}
    history, english = [["A", "B"]], [["a", "b"], ["a2", "b2"]]
    rows, summary = read(
        {**record, "history": history, "history_en": english},
        {**record, "history": json.dumps(history), "history_en": [], "system_en": "Be brief."},
        {**record, "history": " ", "system": "", "instruction_en": None},
        {**record, "history": [["A"]]},
        {**record, "history": 3},
        {**record, "system": 3},
    )
    turns = [user("A"), assistant("B"), user("C")]
    assert [row.prompt for row in rows] == [[SYSTEM, *turns], [SYSTEM, *turns], [user("C")]]
    assert rows[0].prompt_en == [SYSTEM, user("a"), assistant("b"), user("a2"), assistant("b2"), user("c")]
    assert [row.prompt_en for row in rows[1:]] == [[{"role": "system", "content": "Be brief."}, user("c")], None]
    assert summary.bad_rows == {
        "history is not a list of [question, answer]": 2, "system is of type int, not a string": 1
    }  # fmt: skip
    (note,) = summary.notes
    assert note.startswith("1 rows have instruction_en and history, but no history_en")


def test_known_columns_that_are_not_read_are_noted(read):
    _, summary = read({"instruction": "A", "output": "B", "system": "S", "tools": "[]", "images": [], "id": 3})
    assert [note.partition("rows.jsonl: ")[2] for note in summary.notes] == ["not read: the columns tools, images."]
    _, summary = read({"prompt": "A", "completion": "B", "system": "S"})
    assert "not read: the column system." in str(summary)
    _, summary = read({"chosen": "B", "prompt": "A"}, column_map={"completion": "chosen"})
    assert summary.notes == []


def test_messages_form(read):
    talk = [SYSTEM, user("A"), assistant("B"), user("C"), assistant("D")]
    rows, _ = read(
        {"messages": talk, "messages_en": [user("a"), assistant("b"), user("c"), assistant("d")]},
        {"messages": talk, "messages_en": [user("a"), assistant("b"), user("c")]},
        {"messages": talk, "messages_en": []},
        {"messages": talk},
        {"messages": json.dumps(talk)},
    )
    assert len(rows) == 5
    assert all(row.prompt == talk[:-1] and row.response == "D" for row in rows)
    english = [user("a"), assistant("b"), user("c")]
    assert [row.prompt_en for row in rows] == [english, english, None, None, None]


def test_completion_form(read):
    rows, _ = read(
        {"prompt": "A", "completion": "B", "prompt_en": "a"},
        {"prompt": [SYSTEM, user("A")], "completion": "B", "prompt_en": [user("a")]},
        {"prompt": [user("A")], "completion": [assistant("B")], "prompt_en": None},
    )
    assert [row.prompt for row in rows] == [[user("A")], [SYSTEM, user("A")], [user("A")]]
    assert [row.prompt_en for row in rows] == [[user("a")], [user("a")], None]
    assert [row.response for row in rows] == ["B"] * 3


def test_sharegpt_form(read):
    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    whole = {"conversations": turns("A", "B", "C", "D"), "conversations_en": turns("a", "b", "c"), "lang": "sw"}
    rows, summary = read(
        {**whole, "system": "Be kind."},
        {"conversations": [{"from": "system", "value": "Be kind."}, *turns("A", "D")], "system": "Be brief."},
        {"conversations": json.dumps(turns("A", "D")), "conversations_en": None},
        {"conversations": [user("A"), assistant("D")]},
        {"conversations": [*turns("A"), {"from": "observation", "value": "B"}, *turns("A", "D")]},
        {"conversations": [{"from": "human"}, *turns("A", "D")]},
    )
    talk = [user("A"), assistant("B"), user("C")]
    assert [row.prompt for row in rows] == [[SYSTEM, *talk], [SYSTEM, user("A")], [user("A")], [user("A")]]
    assert [row.prompt_en for row in rows] == [[SYSTEM, user("a"), assistant("b"), user("c")], None, None, None]
    assert {row.response for row in rows} == {"D"}
    assert summary.bad_rows == {
        "the prompt has an unknown role 'observation' (known: system, user, assistant)": 1,
        "a turn's content in the prompt is of type NoneType, not a string": 1,
    }


def test_thoughts_apart(read):
    thoughtful = {**assistant("D"), "reasoning_content": "because"}
    rows, summary = read(
        {"messages": [user("A"), {**assistant("B"), "reasoning_content": "so"}, user("C"), thoughtful]},
        {"messages": [user("A"), {**assistant("D"), "reasoning_content": None}]},
        {"prompt": "A", "completion": [thoughtful]},
        {"messages": [user("A"), {**assistant("D"), "reasoning_content": ["because"]}]},
    )
    assert [(row.response, row.reasoning_content) for row in rows] == [("D", "because"), ("D", ""), ("D", "because")]
    assert rows[0].prompt == [user("A"), {**assistant("B"), "reasoning_content": "so"}, user("C")]
    assert summary.bad_rows == {"a turn's reasoning_content in the prompt is of type list, not a string": 1}


def test_forms_may_be_mixed_and_the_one_with_english_wins(read):
    rows, _ = read(
        {"instruction": "A", "output": "B", "prompt": "P", "completion": "Q", "prompt_en": "p"},
        {"instruction": "A", "output": "B"},
        {"messages": [user("X"), assistant("Y")], "instruction": None},
    )
    assert [(row.prompt[0]["content"], row.response) for row in rows] == [("P", "Q"), ("A", "B"), ("X", "Y")]


BAD_RECORDS = {
    "the prompt is empty": {"instruction": " ", "output": "B"},
    "the response is empty": {"instruction": "A", "output": "\n"},
    "the response is missing": {"instruction": "A", "output": None},
    "the response is of type int, not a string": {"instruction": "A", "output": 3},
    "instruction is of type list, not a string": {"instruction": ["A"], "output": "B"},
    "lang is of type int, not a string": {"instruction": "A", "output": "B", "lang": 7},
    "the prompt has an unknown role 'human' (known: system, user, assistant)": {
        "messages": [{"role": "human", "content": "A"}, assistant("B")]
    },
    "the English prompt has an unknown role 'gpt' (known: system, user, assistant)": {
        "messages": [user("A"), assistant("B")],
        "messages_en": [{"role": "gpt", "content": "a"}],
    },
    "messages has no assistant turn, so there is no response": {"messages": [user("A")]},
    "messages goes on after its last assistant turn": {"messages": [user("A"), assistant("B"), user("C")]},
    "the prompt has no user turn": {"messages": [SYSTEM, assistant("B")]},
    "the prompt ends in an assistant turn": {"messages": [user("A"), assistant("B"), assistant("C")]},
    "a turn of the prompt is not {role, content}": {"messages": [{"from": "user", "value": "A"}]},
    "a turn's content in the prompt is of type int, not a string": {"messages": [user(1), assistant("B")]},
    "the prompt is of type int, not a string or a list of messages": {"prompt": 3, "completion": "B"},
    "the English prompt has no user turn": {"prompt": "A", "completion": "B", "prompt_en": [SYSTEM]},
    "the English prompt is empty": {"prompt": "A", "completion": "B", "prompt_en": [assistant("b")]},
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_bad_rows_are_named_and_counted(read, reason):
    good = {"instruction": "A", "output": "B"}
    rows, summary = read(good, BAD_RECORDS[reason], good, BAD_RECORDS[reason])
    assert len(rows) == summary.rows == 2
    assert summary.bad_rows == {reason: 2}
    assert "rows.jsonl:2: " in summary.named_bad_rows[0]
    assert "rows.jsonl:4: " in summary.named_bad_rows[1]
    with pytest.raises(ValueError, match=r"2 bad rows:\n  2 x [\s\S]*rows.jsonl:2: [\s\S]*on_bad_row"):
        read(good, BAD_RECORDS[reason], good, BAD_RECORDS[reason], on_bad_row="error")


def test_only_twenty_bad_rows_are_named(read):
    _, summary = read({"instruction": "A", "output": "B"}, *[{"instruction": "A", "output": ""}] * 30)
    assert summary.bad_rows == {"the response is empty": 30}
    assert len(summary.named_bad_rows) == 20
    assert "the first 20:" in str(summary)
    assert Summary.from_json(summary.to_json()) == summary


def test_no_good_row_is_an_error(read):
    with pytest.raises(ValueError, match=r"No row is left[\s\S]*the response is empty"):
        read({"instruction": "A", "output": ""})
    with pytest.raises(ValueError, match=r'must be "skip" or "error"'):
        read({"instruction": "A", "output": "B"}, on_bad_row="ignore")


def test_missing_column_names_file_columns_nearest_and_map(read):
    with pytest.raises(ValueError) as caught:
        read({"instrction": "A", "output": "B", "instruction_en": "a"})
    message = str(caught.value)
    assert "rows.jsonl: column instruction is missing" in message
    assert "Nearest to 'instruction': 'instrction'" in message
    assert "found: ['instrction', 'output', 'instruction_en']" in message
    assert "messages (English: messages_en)" in message
    assert "column_map" in message


def test_columns_may_appear_late_and_lack_in_some_rows(read):
    rows, summary = read({"instruction": "A"}, {"instruction": "A", "output": "B"})
    assert len(rows) == 1
    assert summary.bad_rows == {"the response is missing": 1}


def test_column_map(read):
    record = {"question": "A", "answer": "B", "question_en": "a", "language": "sw", "output": "not this"}
    column_map = {"instruction": "question", "output": "answer", "instruction_en": "question_en", "lang": "language"}
    rows, _ = read(record, column_map=column_map)
    assert rows == [Row([user("A")], "B", [user("a")], "sw", rows[0].source)]


def test_column_map_faults(read):
    record = {"question": "A", "output": "B", "question_en": "a"}
    with pytest.raises(ValueError, match=r"'instructoin' is none of our column names. Nearest to .*'instruction'"):
        read(record, column_map={"instructoin": "question"})
    with pytest.raises(ValueError, match=r"a column that no source has. Nearest to 'question_eng': 'question_en'"):
        read(record, column_map={"instruction": "question", "instruction_en": "question_eng"})


def test_column_map_serves_sources_that_lack_the_column(tmp_path):
    (tmp_path / "sw.jsonl").write_text(json.dumps({"prompt": "A", "completion": "B", "english": "a"}))
    (tmp_path / "en.jsonl").write_text(json.dumps({"prompt": "A", "completion": "B"}))
    rows, _ = read_rows([tmp_path / "sw.jsonl", tmp_path / "en.jsonl"], column_map={"prompt_en": "english"})
    assert [row.prompt_en for row in rows] == [[user("a")], None]


def test_a_misspelled_english_column_is_noted(read):
    _, summary = read({"instruction": "A", "output": "B", "instruction_eng": "a"})
    assert "no column 'instruction_en' but 'instruction_eng'" in str(summary)
    _, summary = read({"instruction": "A", "output": "B", "id": "a"})
    assert summary.notes == []


def test_an_english_prompt_without_its_input_is_noted(read):
    whole = {"instruction": "A", "input": "B", "output": "C", "instruction_en": "a", "input_en": "b"}
    lacking = {**whole, "input_en": " "}
    rows, summary = read(
        whole, lacking, {**lacking, "output": ""}, {**lacking, "input": ""}, {**lacking, "input_en": None}
    )
    assert len(rows) == 4 and [row.prompt_en for row in rows[1:]] == [[user("a")]] * 3
    (note,) = summary.notes
    assert note.startswith("2 rows have instruction_en and input, but no input_en") and note in str(summary)
    for silent in (whole, {**lacking, "input": None}, {**lacking, "instruction_en": ""}):
        assert read(silent)[1].notes == []


def test_prompts_alone(read):
    """Fitting and generating need no response: it may be absent, and messages may end in a user turn."""
    rows, summary = read(
        {"instruction": "A", "instruction_en": "a"},
        {"prompt": "A", "prompt_en": "a", "completion": "B"},
        {"messages": [user("A")], "messages_en": [user("a")]},
        {"messages": [user("A"), assistant("B")]},
        require_response=False,
    )
    assert [row.prompt for row in rows] == [[user("A")]] * 4
    assert [row.response for row in rows] == ["", "B", "", "B"]
    assert summary.rows_with_english == 3
