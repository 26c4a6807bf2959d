"""70B models on the meta device: every key and shape of the connected model, and what is counted from it."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, Qwen2Config

from cc_ds.plan.size import meta_model, size_of

# config.json of meta-llama/Llama-3.1-70B and Qwen/Qwen2.5-72B
LLAMA_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
QWEN_72B = Qwen2Config(
    vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip
HIDDEN, LAYERS, KV = 8192, 80, 8 * 128


def _expected(vocab: int, ffn: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocab, HIDDEN),
        "decision_maker.weight": (LAYERS, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if bias and name != "o":
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (ffn, HIDDEN)
        shapes[prefix + "mlp.down_proj.weight"] = (HIDDEN, ffn)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (HIDDEN,)
    return shapes


@pytest.mark.parametrize(
    ("config", "ffn", "bias", "billions"), [(LLAMA_70B, 28672, False, 70.55), (QWEN_72B, 29568, True, 72.71)]
)
def test_70b_on_the_meta_device(config, ffn, bias, billions):
    model = meta_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == _expected(config.vocab_size, ffn, bias)
    assert all(parameter.is_meta for parameter in model.parameters())
    size = size_of(model)
    base = size.numel() - LAYERS * HIDDEN
    assert base == sum(p.numel() for name, p in model.named_parameters() if "decision" not in name)
    assert round(base / 1e9, 2) == billions


def test_a_tied_head_counts_once_and_adapters_leave_the_rest_frozen():
    tied = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    size = size_of(meta_model(tied))
    assert size.numel() == sum(p.numel() for p in meta_model(tied).parameters())
    pytest.importorskip("peft")
    adapted = size_of(meta_model(tied, lora_rank=2))
    widths = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    adapters = 2 * sum(2 * (into + out) for into, out in widths)
    assert adapted.numel(trainable=True) == adapters + 2 * 16
    assert adapted.numel() == size.numel() + adapters
