"""Pruning a vocabulary is exact on the texts it was made for."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import prepare_model
from experiments.prune import kept_ids, prune_model, prune_tokenizer

CORPUS = [
    "the weather in the north is cold and the water is colder than the weather",
    "Der Unterricht untersucht unterirdische Unterschiede unter anderem",
    "maji ya bahari na maziwa yanayozunguka nchi na miji mingi",
    "इस पाठ का विषय क्या है और इस विषय का पाठ क्या है",
]
TEXTS = {"prompts": ["the north is cold", "maji ya bahari, ẹ̀kọ́ 水", "विषय क्या है"], "answers": ["water", "bahari"]}


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<unused>"]
    core.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    return core


def byte_fallback() -> Tokenizer:
    """As Gemma's: spaces are letters, no words are split, bytes stand for unknown characters."""
    special = ["<bos>", "<eos>", "<unk>", "<unused>", *(f"<0x{n:02X}>" for n in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    core = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.add_special_tokens(special[:4])
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


@pytest.fixture(params=[byte_level, byte_fallback])
def whole(request, tmp_path):
    """A folder with a tokenizer, and its content."""
    core = request.param()
    bos = core.token_to_id("<bos>")
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def content_of(folder):
    return json.loads((folder / "tokenizer.json").read_text())


def test_same_pieces_on_the_texts_and_fewer_of_them_in_all(whole):
    content = content_of(whole)
    before = Tokenizer.from_str(json.dumps(content))
    texts = TEXTS["prompts"] + TEXTS["answers"]
    used = {i for text in texts for i in before.encode(text).ids}
    pruned = prune_tokenizer(content, used, always={"<eos>"})
    after = Tokenizer.from_str(json.dumps(pruned))
    kept = kept_ids(content, pruned)
    assert len(kept) < before.get_vocab_size() - 50
    assert after.token_to_id("<eos>") is not None and after.token_to_id("<unused>") is None
    for text in texts:
        assert after.encode(text).tokens == before.encode(text).tokens
        assert [kept[i] for i in after.encode(text).ids] == before.encode(text).ids


def test_any_other_text_survives_a_round_trip(whole):
    content = content_of(whole)
    before = Tokenizer.from_str(json.dumps(content))
    used = {i for text in TEXTS["prompts"] for i in before.encode(text).ids}
    after = Tokenizer.from_str(json.dumps(prune_tokenizer(content, used, set())))
    other = "Ĵaŭdo 木曜日 unterirdisch!"
    assert after.decode(after.encode(other).ids) == other
    assert len(after.encode(other).ids) > len(before.encode(other).ids)


@pytest.mark.parametrize("tied", [True, False])
def test_kept_rows_give_the_same_logits(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, bos_token_id=3, eos_token_id=[4, 9], pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    kept = [3, 4, 10, 20, 49]
    with torch.no_grad():
        expected = model(torch.tensor([[3, 20, 10, 49]])).logits[..., kept]
        prune_model(model, kept)
        found = model(torch.tensor([[0, 3, 2, 4]])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (model.config.vocab_size, model.config.bos_token_id, model.config.eos_token_id) == (5, 0, [1])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def tiny(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_whole_model_is_pruned_into_a_folder(whole, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(whole)
    prepare_model.prune(tiny(tokenizer), whole, tmp_path / "pruned", TEXTS, "plain")
    pruned = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert len(pruned) == AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.vocab_size < len(tokenizer)
    assert pruned.convert_ids_to_tokens(pruned("the north is cold").input_ids) == tokenizer.convert_ids_to_tokens(
        tokenizer("the north is cold").input_ids
    )


def test_a_pruned_model_that_differs_is_refused(whole, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(whole)
    monkeypatch.setattr(prepare_model, "prune_model", lambda model, kept: prune_model(model, kept[::-1]))
    with pytest.raises(ValueError, match="logits differ"):
        prepare_model.prune(tiny(tokenizer), whole, tmp_path / "pruned", TEXTS, "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"], "nothing is left behind"
