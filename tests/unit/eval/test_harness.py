"""The lm-evaluation-harness with the connection: HFLM where nothing is connected, one request at a time where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cc_ds import CCModelForCausalLM
from cc_ds.connection.transform import Transform
from cc_ds.eval.harness import CCHarnessLM

REQUESTS = [
    ("Which number comes after one?", " two"),
    ("Which number comes after one?", " three"),
    ("Which number comes after one? two", " three"),  # one text with the line above, another prompt
    ("Namba gani inafuata moja?", " mbili tatu nne"),
    ("Welche Zahl folgt auf zwei?", " drei"),
    ("", "eins"),
]


@pytest.fixture(scope="module")
def connected_folder(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("connected")
    model = CCModelForCausalLM.from_pretrained(model_folder)
    model.set_transform(10 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    return folder


def harness(folder, cls=CCHarnessLM, **more):
    return cls(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, **more)


def loglikelihoods(lm, requests=REQUESTS) -> list[tuple[float, bool]]:
    instances = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(requests)]
    return lm.loglikelihood(instances, disable_tqdm=True)


def generated(lm) -> list[str]:
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    instances = [Instance("generate_until", {}, (text, settings), i) for i, (text, _) in enumerate(REQUESTS[:5])]
    return lm.generate_until(instances, disable_tqdm=True)


def assert_close(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close([value for value, _ in found], [value for value, _ in expected], rtol=1e-5, atol=1e-4)


def test_without_a_connection_it_is_hflm(model_folder, connected_folder):
    plain = harness(model_folder, HFLM)
    for lm in (harness(model_folder), harness(connected_folder, connect=False)):
        assert loglikelihoods(lm) == loglikelihoods(plain)
        assert generated(lm) == generated(plain)


def test_a_connection_to_nothing_is_hflm_too(model_folder):
    """The connected walk itself, with a matrix of zeros: adds nothing anywhere."""
    lm = harness(model_folder)
    lm.model.set_transform(torch.zeros(16, 16))
    lm.connect = True
    assert_close(loglikelihoods(lm), loglikelihoods(harness(model_folder, HFLM)))


def test_loglikelihood_connects_at_the_end_of_the_context(connected_folder, model_folder):
    """Against one request at a time: the first read, S W, and a forward that is given E at the context's last token."""
    lm = harness(connected_folder)
    model = lm.model
    expected = []
    for context, continuation in REQUESTS[:5]:
        prompt, answer = lm._encode_pair(context, continuation)
        source = model.anchor_activations(torch.tensor([prompt]))
        fuse = model.fuse_pass(
            source @ model.transform.matrix, torch.tensor([len(prompt) - 1]), len(prompt) + len(answer)
        )
        with torch.no_grad(), model.hooks.during(fuse):
            hidden = model.model(torch.tensor([prompt + answer])).last_hidden_state
        scores = model.lm_head(hidden)[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        picked = scores.gather(1, torch.tensor(answer)[:, None]).sum().item()
        expected.append((picked, scores.argmax(dim=-1).tolist() == answer))
    found = loglikelihoods(lm)
    assert_close(found[:5], expected)
    plain = loglikelihoods(harness(model_folder, HFLM))
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(found[:5], plain[:5]))
    assert_close(found[5:], plain[5:])  # no prompt, no connection


def test_loglikelihood_and_generation_agree(connected_folder):
    """What connected generation says is what greedy decoding by the connected likelihood would say."""
    lm = harness(connected_folder)
    said = generated(lm)
    prompts = [text for text, _ in REQUESTS[:5]]
    first = []
    for prompt in prompts:
        ids = torch.tensor([lm.tok_encode(prompt)])
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        first.append(out[0, -1:].tolist())
    requests = [((text, ""), lm.tok_encode(text), token) for text, token in zip(prompts, first)]
    assert all(greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True))
    assert said != generated(harness(connected_folder, connect=False))


def test_the_language_names_the_matrix(connected_folder, model_folder, tmp_path):
    shared = harness(connected_folder)
    matrix = shared.model.transform.matrix
    shared.model.set_transform(Transform([torch.stack([0 * matrix, matrix])], "per_language", ["de", "sw"]))
    shared.model.save_pretrained(tmp_path)
    shared.tokenizer.save_pretrained(tmp_path)
    named, connected = harness(tmp_path, lang="sw"), harness(connected_folder)
    assert_close(loglikelihoods(named), loglikelihoods(connected))
    assert generated(named) == generated(connected)
    plain = harness(model_folder, HFLM)
    for english in (harness(tmp_path, lang="en"), harness(connected_folder, lang="en-GB")):
        assert loglikelihoods(english) == loglikelihoods(plain)
    for more in ({}, {"lang": "yo"}):
        with pytest.raises(ValueError, match="lang=L, one of de, sw, or connect=False"):
            harness(tmp_path, **more)


def test_a_context_too_long_is_cut_from_the_left(connected_folder):
    lm, short = harness(connected_folder, max_length=12), harness(connected_folder)
    context = list(range(5, 45))
    (cut,) = lm._loglikelihood_tokens([(("", ""), context, [7, 8])], disable_tqdm=True)
    (kept,) = short._loglikelihood_tokens([(("", ""), context[-11:], [7, 8])], disable_tqdm=True)
    assert_close([cut], [kept])


def test_rolling_is_hflm(connected_folder, model_folder):
    instances = [Instance("loglikelihood_rolling", {}, ("moja mbili tatu",), 0)]
    found, plain = (
        lm.loglikelihood_rolling(instances, disable_tqdm=True)
        for lm in (harness(connected_folder), harness(model_folder, HFLM))
    )
    assert found == plain


def test_a_local_task_runs_from_end_to_end(connected_folder, rows_of, tmp_path):
    rows = [
        {"question": row["instruction"], "choices": [row["answers"][0], "moja"], "gold": 0} for row in rows_of("sw")[1:]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "numbers.yaml").write_text(
        f"""task: cc_numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = {
        connect: lm_eval.simple_evaluate(
            model="cc_ds",
            model_args=f"pretrained={connected_folder},dtype=float32,connect={connect}",
            tasks=["cc_numbers"],
            task_manager=manager,
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
            log_samples=True,
        )
        for connect in (True, False)
    }
    likelihoods = [str([s["filtered_resps"] for s in r["samples"]["cc_numbers"]]) for r in results.values()]
    assert likelihoods[0] != likelihoods[1]
    for result in results.values():
        assert 0 <= result["results"]["cc_numbers"]["acc,none"] <= 1
        assert len(result["samples"]["cc_numbers"]) == 6
