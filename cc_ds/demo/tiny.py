"""A tokenizer and a tiny Llama made on the spot, so that the demo needs no download.

    texts -> train_tokenizer -> folder that AutoTokenizer loads
    tiny_llama(len(tokenizer), seed) -> stock LlamaForCausalLM, random weights -> save_tiny -> folder

The tokenizer is a SentencePiece unigram model with byte fallback, carried over to a fast Hugging Face tokenizer: any
text in any script survives a round trip. A turn of the chat costs one token at each end:

    <s><|user|>question<|assistant|>answer<|end|>
"""

from __future__ import annotations

import io
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
LONGEST_PIECE = 24  # characters
END_ID = 7  # user-defined pieces follow the four control pieces, in the order given to the trainer

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _seeds(texts: list[str]) -> Counter[str]:
    """Candidate pieces with their counts: every word (with its leading "▁") and each part of 2 to 4 letters.

    SentencePiece's own candidates are strings that occur in two distinct words, so the words of a question template,
    each one distinct word however often it is written, would fall to pieces and a prompt would be twice as long.
    """
    words: Counter[str] = Counter()
    for text in texts:
        spaced = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in f"▁{text.replace(' ', ' ▁')}")
        words.update(spaced.split())
    seeds: Counter[str] = Counter()
    for word, count in words.items():
        parts = [word[start : start + size] for size in (2, 3, 4) for start in range(len(word) - size + 1)]
        for piece in [word, *parts] if 4 < len(word) <= LONGEST_PIECE else parts:
            seeds[piece] += count
    return seeds


def _unigram_pieces(texts: list[str], vocab_size: int) -> list[tuple[str, float]]:
    """(piece, log-probability) by id. One thread and the identity normaliser: the same pieces on every machine."""
    written = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        seed_file = Path(folder) / "seeds.tsv"
        seeds = sorted(_seeds(texts).items(), key=lambda item: (-item[1], item[0]))
        seed_file.write_text("".join(f"{piece}\t{count}\n" for piece, count in seeds), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus has fewer words than were asked for
            seed_sentencepieces_file=str(seed_file),
            max_sentencepiece_length=LONGEST_PIECE,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            num_threads=1,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            user_defined_symbols=[USER, ASSISTANT, SYSTEM, END],
            minloglevel=2,
        )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]


def train_tokenizer(
    texts: Iterable[str], folder: str | Path, vocab_size: int = 4000, model_max_length: int = 256
) -> PreTrainedTokenizerBase:
    """Train on `texts`, save to `folder` as a Hugging Face tokenizer, and return it as AutoTokenizer would load it."""
    pieces = _unigram_pieces(list(texts), vocab_size)
    core = Tokenizer(models.Unigram(pieces, unk_id=UNK_ID, byte_fallback=True))
    # Every stretch of text between two markers gets SentencePiece's leading space, so a name is the same tokens at the
    # start of a question, within one, and as the answer.
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=END,  # what ends an answer; </s> stays in the vocabulary, unused
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    assert tokenizer.convert_tokens_to_ids(END) == END_ID
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(
    vocab_size: int,
    seed: int,
    *,
    hidden_size: int = 192,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    intermediate_size: int = 512,
    max_position_embeddings: int = 256,
) -> LlamaForCausalLM:
    """A stock Llama in float32 with tied embeddings; `vocab_size` is len(tokenizer). The global RNG stays as it was."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,  # the usual 0.02 is meant for wider models and learns far more slowly here
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.update(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=END_ID)
    return model


def save_tiny(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """One folder that AutoModelForCausalLM and AutoTokenizer load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
