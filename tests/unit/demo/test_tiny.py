"""The tiny model: a tokenizer that loses nothing in any script, and a stock Llama of the promised size."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cc_ds.demo.atlas import build_atlas
from cc_ds.demo.tiny import BOS_ID, END, END_ID, PAD_ID, save_tiny, tiny_llama, train_tokenizer


@pytest.fixture(scope="module")
def atlas():
    return build_atlas(0)


@pytest.fixture(scope="module")
def texts(atlas):
    return [row[column] for row in atlas.warmup + atlas.train for column in ("instruction", "output")]


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(texts, path)
    save_tiny(tiny_llama(len(tokenizer), seed=0), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_round_trip_of_every_text(texts, atlas, tokenizer):
    texts = sorted({*texts, *(row["instruction"] for row in atlas.test + atlas.dev)})
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert tokenizer.unk_token_id not in {i for row in ids for i in row}


@pytest.mark.parametrize("text", ["日本語 🦊", "a  b", "naïve – “x”", "ꦗꦮ"])
def test_round_trip_of_what_was_never_seen(text, tokenizer):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_an_answer_decodes_to_the_name(atlas, tokenizer):
    for row in atlas.test:
        chat = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        whole = tokenizer.apply_chat_template(chat)["input_ids"]
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        assert whole[: len(prompt)] == prompt and whole[0] == BOS_ID and whole[-1] == END_ID
        assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True).strip() == row["output"]


def test_markers_are_single_tokens(tokenizer):
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<s><|user|>x<|assistant|>"
    for marker in ("<|user|>", "<|assistant|>", "<|system|>", END):
        assert len(tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD_ID, BOS_ID, END_ID)


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer):
    name = tokenizer("Kenya")["input_ids"]
    assert tokenizer("Kenya: which region?")["input_ids"][: len(name)] == name
    inside = tokenizer("Country: Kenya. Region?")["input_ids"]
    assert any(inside[i : i + len(name)] == name for i in range(len(inside)))


def test_template_words_are_whole_tokens(tokenizer):
    """The reason for our own seeds: without them 'Währung' falls into letters and prompts are twice as long."""
    assert tokenizer.tokenize("Land: Peru. Währung?") == ["▁Land", ":", "▁Peru", ".", "▁Währung", "?"]


def test_the_same_tokenizer_twice(texts, tokenizer, tmp_path):
    again = train_tokenizer(texts, tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("Nchi: Kenya. Sarafu?")["input_ids"] == tokenizer("Nchi: Kenya. Sarafu?")["input_ids"]


def test_loads_as_a_stock_llama_of_the_promised_size(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert 2e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 6e6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 256
    assert model.generation_config.eos_token_id == END_ID and model.generation_config.pad_token_id == PAD_ID


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tiny_llama(300, seed=5, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = tiny_llama(300, seed=5, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    other = tiny_llama(300, seed=6, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
