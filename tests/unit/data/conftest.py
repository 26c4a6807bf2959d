"""Tiny tokenizers, trained on the spot: a byte-level BPE (like Llama 3) and a SentencePiece-like one (like Llama 2)."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "What is the capital of Kenya? Nairobi is the capital of Kenya.",
    "Je, mji mkuu wa Kenya ni upi? Mji mkuu wa Kenya ni Nairobi.",
    "Wie heißt die Hauptstadt von Kenia?\nSie heißt Nairobi.\n",
    "user assistant system model",
] * 5
CHAT_TOKENS = [
    *("<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]"),
]


def bpe_tokenizer(bos: bool = True, chat_tokens: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with `bos` its post-processor puts <|bos|> in front, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>", *(CHAT_TOKENS if chat_tokens else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>" if bos else None,
        eos_token="<|eos|>" if eos else None,
        pad_token="<|pad|>",
    )


def llama_tokenizer(bos: bool = True) -> LlamaTokenizer:
    """BPE over text with ▁ for spaces and a space put before every text, as SentencePiece does."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = LlamaTokenizer(vocab=model["vocab"], merges=merges, legacy=False, add_bos_token=bos)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS])
    return made


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def llama() -> LlamaTokenizer:
    return llama_tokenizer()


@pytest.fixture
def make_bpe():
    return bpe_tokenizer


@pytest.fixture
def make_llama():
    return llama_tokenizer
