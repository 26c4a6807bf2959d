"""Small random models of every family that cc_ds knows, made on the spot."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cc_ds import CCConfig, CCModelForCausalLM

VOCAB, HIDDEN, LAYERS = 96, 32, 3

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,  # large enough that every part of a tiny model matters
)
_GROUPED = dict(num_key_value_heads=2)
_GEMMA = dict(head_dim=8, query_pre_attn_scalar=8)

CONFIGS = {
    "llama": dict(**_COMMON, **_GROUPED),
    "mistral": dict(**_COMMON, **_GROUPED, sliding_window=4),
    "qwen2": dict(**_COMMON, **_GROUPED),
    "qwen3": dict(**_COMMON, **_GROUPED, head_dim=8),
    # Eager attention, all that Gemma 2 has, takes its softmax in float32, where a row of float64 minima is NaN: no
    # window that leaves a padding position without keys.
    "gemma2": dict(**_COMMON, **_GROUPED, **_GEMMA, sliding_window=12),
    "gemma3_text": dict(
        **_COMMON, **_GROUPED, **_GEMMA, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": dict(**_COMMON, **_GROUPED),
    "olmo2": dict(**_COMMON, **_GROUPED),
    "gpt_neox": dict(**_COMMON, rotary_pct=0.5),
    "mixtral": dict(**_COMMON, **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        **_COMMON, **_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        mlp_only_layers=[1],
    ),
}  # fmt: skip


def hf_config(family: str):
    """A small config of the family."""
    return AutoConfig.for_model(family, **CONFIGS[family])


def cc_model(family: str = "llama", seed: int = 0, dtype=torch.float32, **cc) -> CCModelForCausalLM:
    """A connected model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = CCModelForCausalLM.from_config(hf_config(family), cc_config=CCConfig(**cc))
    # norms and biases start at 1 and 0, which hides mistakes in where they stand
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def stock_twin(model: CCModelForCausalLM):
    """The plain transformers model with the same base weights."""
    twin = AutoModelForCausalLM.from_config(model.config).to(model.dtype)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("decision_maker.")})
    return twin.eval()


def batch(seed: int = 0, rows: int = 3, length: int = 12, english_length: int = 9) -> dict[str, torch.Tensor]:
    """Right-padded target and English rows of different lengths, with labels after each anchor."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, length + 1, (rows,), generator=draw)
    english_lengths = torch.randint(4, english_length + 1, (rows,), generator=draw)
    anchors = torch.randint(3, 6, (rows,), generator=draw)
    input_ids = torch.randint(3, VOCAB, (rows, length), generator=draw)
    english_input_ids = torch.randint(3, VOCAB, (rows, english_length), generator=draw)
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    english_attention_mask = (torch.arange(english_length) < english_lengths[:, None]).long()
    after_anchor = torch.arange(length) > anchors[:, None]
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "labels": torch.where(after_anchor & (attention_mask == 1), input_ids, -100),
        "anchors": anchors,
        "english_input_ids": english_input_ids * english_attention_mask,
        "english_attention_mask": english_attention_mask,
        "english_anchors": english_lengths - 1,
    }


def tokenised_rows(seed: int = 0, count: int = 5) -> list[dict]:
    """Tokenised rows of different lengths; the second and the last have no English."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, VOCAB, (length,), generator=draw).tolist()

    rows = []
    for index in range(count):
        prompt, response = tokens(3, 9), tokens(1, 6)
        english = [] if index in (1, count - 1) else tokens(2, 8)
        rows.append({
            "input_ids": prompt + response, "labels": [-100] * len(prompt) + response, "anchor": len(prompt) - 1,
            "english_input_ids": english, "english_anchor": max(0, len(english) - 1), "lang": "sw",
            "source": f"rows.jsonl:{index}",
        })  # fmt: skip
    return rows
