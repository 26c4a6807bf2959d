"""Batched, padded, grouped generation against one prompt at a time; scores and files of an evaluation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cc_ds.connection.transform import Transform
from cc_ds.data.templates import RenderedPrompt, load_template
from cc_ds.dist.group import Group
from cc_ds.eval.journal import Answer, Journal
from cc_ds.eval.report import format_table, plot_languages
from cc_ds.eval.rows import EvalRow
from cc_ds.eval.run import evaluate, score, write_json
from cc_ds.eval.tasks import Task
from cc_ds.infer.prompts import length_batches, pad_prompts, respond

TOKENS = 6


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def eval_rows(rows_of):
    def make(lang: str, english: bool = True) -> list[EvalRow]:
        return [
            EvalRow(
                prompt=turn(row["instruction"]),
                answers=tuple(row["answers"]),
                lang=lang,
                prompt_en=turn(row["instruction_en"]) if english else None,
                where="test",
            )
            for row in rows_of(lang)
        ]

    return make


@pytest.fixture(scope="module")
def rows(eval_rows):
    return eval_rows("sw") + eval_rows("de")


def one_by_one(model, tokenizer, template, rows, **inputs_of) -> list[str]:
    texts = []
    for row in rows:
        ids = torch.tensor([template.render_prompt(row.prompt).ids])
        inputs = {name: function(row) for name, function in inputs_of.items()}
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=template.stop_token_ids,
            pad_token_id=0,
            **inputs,
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def responses(result) -> list[str]:
    return [answer["response"] for answer in result.answers]


def task_of(rows, *metrics: str) -> Task:
    metrics = metrics or ("exact_match", "inclusion")
    return Task(name="numbers", rows=rows, rules=dict(zip(metrics, metrics)))


def run(model, tokenizer, template, rows, mode, **more):
    return evaluate(model, tokenizer, template, task_of(rows), mode, batch_size=3, max_new_tokens=TOKENS, **more)


def test_plain_equals_the_stock_model_one_prompt_at_a_time(model, model_folder, tokenizer, template, rows):
    stock = AutoModelForCausalLM.from_pretrained(model_folder)
    model.set_transform(torch.randn(16, 16))
    result = run(model, tokenizer, template, rows, "plain")
    assert responses(result) == one_by_one(stock, tokenizer, template, rows)
    assert len(set(responses(result))) > 5, "the model is too dull for this test to mean anything"


def test_transform_equals_one_prompt_at_a_time_and_differs_from_plain(model, tokenizer, template, rows):
    model.set_transform(10 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    result = run(model, tokenizer, template, rows, "transform")
    assert responses(result) == one_by_one(model, tokenizer, template, rows)
    assert responses(result) != responses(run(model, tokenizer, template, rows, "plain"))


def test_transform_reads_english_rows_plain(model, tokenizer, template, eval_rows, tmp_path):
    model.set_transform(10 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    rows = [*eval_rows("sw"), *eval_rows("en")]
    connected = one_by_one(model, tokenizer, template, rows)
    plain = one_by_one(model, tokenizer, template, rows, connect=lambda row: False)
    assert all(a != b for a, b in zip([connected[0], connected[7]], [plain[0], plain[7]]))
    # One journal: what was answered with other languages excluded is not taken.
    expected = {("en",): connected[:7] + plain[7:], (): connected, ("en", "sw"): plain}
    for exclude, texts in expected.items():
        result = run(model, tokenizer, template, rows, "transform", exclude=exclude, journal=Journal(tmp_path, "m"))
        assert responses(result) == texts
    assert responses(run(model, tokenizer, template, rows, "transform")) == expected["en",]


def test_each_row_is_connected_through_its_languages_matrix(model, tokenizer, template, eval_rows):
    matrices = 10 * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    model.set_transform(Transform([matrices], "per_language", ["sw", "de"]))
    rows = [*eval_rows("sw"), *eval_rows("de"), *eval_rows("en")]
    result = run(model, tokenizer, template, rows, "transform")
    assert responses(result) == one_by_one(model, tokenizer, template, rows, languages=lambda row: [row.lang])
    calls = []
    model.generate = calls.append
    nameless = [*rows, EvalRow(prompt=turn("q"), answers=("a",), lang="und", prompt_en=None, where="test")]
    with pytest.raises(ValueError, match=r"no matrix for language 'und' \(the row names none\), only for sw, de"):
        run(model, tokenizer, template, nameless, "transform")
    assert not calls, "said before anything is asked"


def test_english_equals_one_prompt_at_a_time_and_reads_rows_without_it_plain(model, tokenizer, template, eval_rows):
    rows = [*eval_rows("sw"), *eval_rows("en", english=False)]
    result = run(model, tokenizer, template, rows, "english")
    connected = one_by_one(
        model,
        tokenizer,
        template,
        rows[:7],
        english_input_ids=lambda row: torch.tensor([template.render_prompt(row.prompt_en).ids]),
    )
    assert responses(result) == connected + one_by_one(model, tokenizer, template, rows[7:])
    assert connected != one_by_one(model, tokenizer, template, rows[:7])


def test_modes_that_cannot_run_say_why(model, tokenizer, template, rows, eval_rows):
    with pytest.raises(ValueError, match="needs a model with a Transform Matrix"):
        run(model, tokenizer, template, rows, "transform")
    with pytest.raises(ValueError, match="needs rows with an English prompt"):
        run(model, tokenizer, template, eval_rows("sw", english=False), "english")
    with pytest.raises(ValueError, match="mode must be one of"):
        run(model, tokenizer, template, rows, "both")
    with pytest.raises(ValueError, match="no rows"):
        run(model, tokenizer, template, [], "plain")


class Fake:
    """Answers a prompt of n tokens with what `said[n]` holds, padded to one length with 0."""

    device = torch.device("cpu")

    def __init__(self, said: dict[int, list[int]]):
        self.said, self.calls = said, []

    def generate(self, input_ids, attention_mask, **kwargs):
        self.calls.append(kwargs)
        said = [self.said[int(n)] for n in attention_mask.sum(1)]
        width = max(map(len, said))
        return torch.cat([input_ids, torch.tensor([ids + [0] * (width - len(ids)) for ids in said])], dim=1)


def test_answers_end_at_the_stop_token_and_keep_their_places():
    fake_tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=9)
    fake_template = SimpleNamespace(stop_token_ids=[9], decode_response=lambda ids: " ".join(map(str, ids)))
    fake = Fake({2: [5, 9], 3: [6, 6, 6], 4: [9, 7, 9]})
    prompts = [RenderedPrompt(list(range(1, n + 1)), n - 1) for n in (3, 2, 4, 2)]
    found = respond(fake, fake_tokenizer, fake_template, prompts, batch_size=3, max_new_tokens=3)
    assert [(r.text, r.tokens) for r in found] == [("6 6 6", 3), ("5", 2), ("", 1), ("5", 2)]
    assert all(call["eos_token_id"] == [9] and call["do_sample"] is False for call in fake.calls)


def test_the_templates_prefix_is_not_scored(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    begin = "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + begin + "{{ m['content'] + eos_token }}{% endfor %}"
    template = load_template(tokenizer)
    prompt = template.render_prompt(turn("moja"))
    fake = Fake({len(prompt.ids): template.render_response("mbili")})
    (found,) = respond(fake, tokenizer, template, [prompt])
    assert (found.text, found.tokens) == ("mbili", len(template.render_response("mbili")))


def test_padding_moves_the_anchor_with_the_prompt():
    prompts = [RenderedPrompt([5, 6, 7, 8], 2), RenderedPrompt([4, 3], 1)]
    ids, mask, anchors = pad_prompts(prompts, 0, "left")
    assert ids.tolist() == [[5, 6, 7, 8], [0, 0, 4, 3]] and mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert ids.gather(1, anchors[:, None]).squeeze(1).tolist() == [7, 3]
    ids, mask, anchors = pad_prompts(prompts, 0, "right")
    assert ids.tolist()[1] == [4, 3, 0, 0] and mask.tolist()[1] == [1, 1, 0, 0] and anchors.tolist() == [2, 1]


def test_length_batches_cover_everything_once_longest_first():
    lengths = [3, 9, 1, 9, 4]
    batches = list(length_batches(lengths, 2))
    assert batches == [[1, 3], [4, 0], [2]]
    with pytest.raises(ValueError, match="batch_size"):
        next(length_batches(lengths, 0))


def scored() -> object:
    rows = [
        EvalRow(prompt=turn(f"q{n}"), answers=("Moja",), lang=lang, prompt_en=None, where="", item=item)
        for n, (lang, item) in enumerate((("sw", "a"), ("sw", "b"), ("sw", ""), ("sw", ""), ("de", "")))
    ]
    said = ["moja.", "ni moja", "", "mbili", "moja"]
    answers = [Answer(text=text, tokens_in=10, tokens_out=2, seconds=0.4) for text in said]
    return score(task_of(rows), answers, mode="plain")


def means(score) -> tuple[float, ...]:
    return tuple(metric.mean for metric in score.metrics.values())


def test_scores_by_language_group_and_macro():
    result = scored()
    swahili = result.languages["sw"]
    assert (swahili.rows, swahili.empty, means(swahili)) == (4, 1, (0.25, 0.5))
    assert means(result.languages["de"]) == (1, 1)
    assert (result.macro.rows, result.macro.empty, means(result.macro)) == (5, 1, (0.625, 0.75))
    assert result.groups == {"high": result.languages["de"], "low": swahili}
    interval = swahili.metrics["exact_match"]
    assert 0 <= interval.low <= 0.25 <= interval.high <= 1 and interval.low < interval.high
    assert (result.languages["de"].metrics["exact_match"].low, result.tokens_in, result.tokens_out) == (1, 50, 10)
    assert result.seconds == pytest.approx(2.0)


def test_table_json_and_figure(tmp_path):
    result = scored()
    lines = format_table(result).splitlines()
    assert [line.split()[0] for line in lines] == ["language", "de", "sw", "high", "low", "macro", "mode"]
    assert lines[2].split()[1:3] == ["4", "0.250"] and lines[2].split()[-1] == "1"
    assert "50 tokens in, 10 tokens out in 2.0 s (5.0 tokens/s)" in lines[-1]
    path = tmp_path / "new" / "result.json"
    write_json(result, path, model="m")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["model"] == "m" and content["macro"]["metrics"]["exact_match"]["mean"] == 0.625
    assert content["answers"][1]["response"] == "ni moja" and content["languages"]["sw"]["empty"] == 1
    assert content["answers"][1]["scores"] == {"exact_match": 0, "inclusion": 1}
    assert [answer["item"] for answer in content["answers"]] == ["a", "b", *(a["id"] for a in content["answers"][2:])]
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    plot_languages(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_model_that_says_nothing_scores_zero_and_is_counted():
    rows = [EvalRow(prompt=turn("q"), answers=("1",), lang="sw", prompt_en=None, where="", options={"1": "", "2": ""})]
    silent = [Answer(text="", tokens_in=1, tokens_out=1, seconds=0.1)]
    metrics = ("choice", "exact_match", "inclusion", "squad_em", "f1", "rouge_l")
    result = score(task_of(rows, *metrics), silent, mode="plain")
    assert means(result.macro) == (0,) * 6 and (result.macro.rows, result.macro.empty) == (1, 1)


def rank_of_two(rank: int, said_by_the_other: dict[str, Answer]) -> Group:
    """One of two ranks, whose other gathers what the test says."""

    class Rank(Group):
        def gather(self, value):
            return [said_by_the_other, value]

        def barrier(self):
            pass

    return Rank(rank, 2, torch.device("cpu"))


def test_two_ranks_share_the_rows_and_find_what_one_finds(model, tokenizer, template, rows, monkeypatch):
    whole = run(model, tokenizer, template, rows, "plain")
    elsewhere = {row.id: Answer(text="elsewhere", tokens_in=1, tokens_out=1, seconds=0.0) for row in rows}
    own = []
    for rank in (0, 1):
        result = run(model, tokenizer, template, rows, "plain", group=rank_of_two(rank, elsewhere))
        own.append({answer["id"]: answer["response"] for answer in result.answers if answer["response"] != "elsewhere"})
    assert len(own[0]) == len(own[1]) == 7
    assert own[0] | own[1] == {answer["id"]: answer["response"] for answer in whole.answers}


def test_ranks_that_see_different_files_deal_the_rows_alike(model, tokenizer, template, rows, tmp_path):
    """The other rank has found six answers that this one does not see (another node, a file system's cache)."""
    theirs = {row.id: Answer(text="known", tokens_in=1, tokens_out=1, seconds=0.0) for row in rows[:6]}
    group = rank_of_two(0, theirs)
    Journal(tmp_path, "m").open({}, Group.alone())
    order = sorted(rows[6:], key=lambda row: -len(template.render_prompt(row.prompt).ids))
    gathered = iter([theirs, {row.id: theirs[rows[0].id] for row in order[1::2]}])
    type(group).gather = lambda self, value: [value, next(gathered)]
    result = run(model, tokenizer, template, rows, "plain", group=group, journal=Journal(tmp_path, "m"))
    assert responses(result)[:6] == ["known"] * 6 and len(set(responses(result)[6:])) > 1


def test_a_killed_run_goes_on(model, tokenizer, template, rows, tmp_path, monkeypatch):
    whole = run(model, tokenizer, template, rows, "plain")
    monkeypatch.setattr("cc_ds.eval.run._BATCHES_BETWEEN_WRITES", 1)
    plain_generate = model.generate
    calls = []

    def dies_at_the_third(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain_generate(*arguments, **more)

    monkeypatch.setattr(model, "generate", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, template, rows, "plain", journal=Journal(tmp_path, "m"))
    result = run(model, tokenizer, template, rows, "plain", journal=Journal(tmp_path, "m"))
    assert len(calls) == 3 + 3, "14 rows in batches of three, six of them known"
    assert responses(result) == responses(whole) and result.tokens_out == whole.tokens_out
    run(model, tokenizer, template, rows, "plain", journal=Journal(tmp_path, "m"))
    assert len(calls) == 6, "nothing is asked again"
    run(model, tokenizer, template, rows, "plain", journal=Journal(tmp_path, "another model"))
    assert len(calls) == 11


def test_the_same_question_twice_is_asked_once_and_counted_twice(model, tokenizer, template, rows):
    result = run(model, tokenizer, template, [*rows[:2], rows[0]], "plain")
    assert result.macro.rows == 3 and result.tokens_in == sum(a["tokens_in"] for a in result.answers[:2])
    assert result.answers[0] == result.answers[2]
