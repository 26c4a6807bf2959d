"""A tiny Llama with its tokenizer, saved as a model folder: random weights, but everything of the real walk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cc_ds import CCModelForCausalLM
from cc_ds.data.templates import load_template
from cc_ds.demo.tiny import save_tiny, tiny_llama, train_tokenizer

NUMBERS = {
    "en": ["one", "two", "three", "four", "five", "six", "seven", "eight"],
    "sw": ["moja", "mbili", "tatu", "nne", "tano", "sita", "saba", "nane"],
    "de": ["eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht"],
}
QUESTION = {"en": "Which number comes after {}?", "sw": "Namba gani inafuata {}?", "de": "Welche Zahl folgt auf {}?"}


def rows_of(lang: str) -> list[dict]:
    return [
        {
            "instruction": QUESTION[lang].format(word),
            "instruction_en": QUESTION["en"].format(NUMBERS["en"][i]),
            "answers": [NUMBERS[lang][i + 1]],
            "lang": lang,
        }
        for i, word in enumerate(NUMBERS[lang][:-1])
    ]


@pytest.fixture(scope="session", name="rows_of")
def rows_of_fixture():
    return rows_of


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    texts = [text for lang in NUMBERS for row in rows_of(lang) for text in (row["instruction"], *row["answers"])]
    tokenizer = train_tokenizer(texts * 3, folder, vocab_size=400)
    model = tiny_llama(
        len(tokenizer), 0, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)  # at the initial scale every prompt would get the same answer
    save_tiny(model, tokenizer, folder)
    torch.manual_seed(0)
    CCModelForCausalLM.from_pretrained(folder).save_pretrained(folder)  # with a Decision Maker
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def template(tokenizer):
    return load_template(tokenizer)


@pytest.fixture
def model(model_folder):
    return CCModelForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [row for lang in ("sw", "de") for row in rows_of(lang)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
