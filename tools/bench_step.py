"""What a training step costs: stock Hugging Face SFT, ours, and CC-Tuning, interleaved in one run.

    python tools/bench_step.py --lengths uniform
    python tools/bench_step.py --lengths data.jsonl --output bench.json      # lengths of real rows (see --help)

Arms, same model, rows and optimiser (torch's AdamW):
    stock      model(**padded batch).loss, as a plain training loop does
    sft        ours: packed, loss over labelled positions
    cc         CC-Tuning, gradient through English
    cc-nograd  CC-Tuning, english_grad false
Every round runs every arm once, in another order; a ratio is taken within its round. Figures are medians and, in
brackets, the middle half. Floors are counted FLOPs: SFT on real tokens with logits at labels only; plus the English
layers, forward or forward and backward, the last one's feed-forward block at the anchor only.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cc_ds import CCConfig, CCModelForCausalLM, cli
from cc_ds.data.batches import CCCollator
from cc_ds.data.packing import pack
from cc_ds.eval.run import write_json
from cc_ds.models.attention import PACKED

ARMS = ("stock", "sft", "cc", "cc-nograd")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one row."""

    english: int
    prompt: int
    response: int


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths",
        default="uniform",
        help="uniform (English 128, target 192 + 128), or a jsonl of english, prompt, response token counts",
    )
    parser.add_argument("--hidden", type=cli.positive, default=512)
    parser.add_argument("--layers", type=cli.positive, default=8)
    parser.add_argument("--vocab", type=cli.positive, default=8192)
    parser.add_argument("--batch", type=cli.positive, default=8, help="rows per step (default 8)")
    parser.add_argument("--rounds", type=cli.positive, default=15, help="after one that warms up (default 15)")
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--output", type=Path, help="json file for every figure")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    batches = make_batches(args)
    arms = {name: Arm(name, args) for name in ARMS}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(args.rounds + 1):
        for name in random.Random(number).sample(ARMS, len(ARMS)):
            seconds = arms[name].step(batches[number % len(batches)])
            if number:
                times[name].append(seconds)
    result = summarise(times, floors(args, batches), args)
    print(format_result(result))
    if args.output:
        write_json(result, args.output)


class Arm:
    """One way to train a step, with its own copy of the same model and its own optimiser."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        torch.manual_seed(0)
        cc = CCConfig(english_grad=name == "cc")
        self.model = CCModelForCausalLM.from_config(_config(args), cc_config=cc)
        if name == "stock":
            stock = AutoModelForCausalLM.from_config(_config(args))
            stock.load_state_dict({k: v for k, v in self.model.state_dict().items() if "decision" not in k})
            self.model = stock
        else:
            self.model.set_attn_implementation(PACKED)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self, rows: list[dict[str, Any]]) -> float:
        """Seconds of one optimiser step, collation included."""
        start = time.perf_counter()
        if self.name == "stock":
            padded = CCCollator(0, connect=False)(rows)
            loss = self.model(**{key: padded[key] for key in ("input_ids", "attention_mask", "labels")}).loss
        else:
            batch = pack(rows, 0, connect=self.name != "sft")
            loss = self.model(packed=batch, num_items_in_batch=len(batch.labels)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def make_batches(args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Random tokens in rows of the wanted lengths; one batch for uniform lengths, else the file's rows in order."""
    if args.lengths == "uniform":
        rows = [Lengths(128, 192, 128)] * args.batch
    else:
        lines = Path(args.lengths).read_text(encoding="utf-8").splitlines()
        rows = [Lengths(**json.loads(line)) for line in lines]
        if len(rows) < args.batch:
            raise ValueError(f"{args.lengths}: {len(rows)} rows, fewer than one batch of {args.batch}")
    draw = torch.Generator().manual_seed(0)
    tokenised = [_row(lengths, args.vocab, draw) for lengths in rows]
    return [tokenised[start : start + args.batch] for start in range(0, len(rows) - args.batch + 1, args.batch)]


def _row(lengths: Lengths, vocab: int, draw: torch.Generator) -> dict[str, Any]:
    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocab, (count,), generator=draw).tolist()

    prompt, response = tokens(lengths.prompt), tokens(lengths.response)
    return {
        "input_ids": prompt + response,
        "labels": [-100] * len(prompt) + response,
        "anchor": len(prompt) - 1,
        "english_input_ids": tokens(lengths.english),
        "english_anchor": lengths.english - 1,
        "lang": "und",
        "source": "bench",
    }


def floors(args: argparse.Namespace, batches: list[list[dict[str, Any]]]) -> dict[str, float]:
    """FLOPs that each arm cannot do without, mean over the batches; causal attention counted at half."""
    config = _config(args)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    attention = 2 * hidden * (2 * hidden + 2 * kv)
    block = 2 * 3 * hidden * config.intermediate_size

    def forward(length: int, last_block_at: int | None = None) -> float:
        scores = layers * 2 * length * (length + 1) * hidden  # QK^T and AV, 2 FLOPs each, half the square
        blocks = layers * length if last_block_at is None else (layers - 1) * length + last_block_at
        return layers * length * attention + blocks * block + scores

    sft = english = 0.0
    for row in (row for batch in batches for row in batch):
        labels = sum(label != -100 for label in row["labels"])
        sft += forward(len(row["input_ids"])) + labels * 2 * hidden * config.vocab_size
        english += forward(len(row["english_input_ids"]), last_block_at=1)
    sft, english = sft / len(batches), english / len(batches)
    return {"sft": 3 * sft, "cc": 3 * sft + 3 * english, "cc-nograd": 3 * sft + english}


def summarise(times: dict[str, list[float]], floor: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Medians, ratios within rounds, and ratios of floors."""

    def ratio(arm: str, to: str) -> dict[str, float]:
        values = [mine / other for mine, other in zip(times[arm], times[to], strict=True)]
        low, middle, high = statistics.quantiles(values, n=4)
        return {"median": middle, "low": low, "high": high}

    return {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "stock over sft": ratio("stock", "sft"),
        "cc over sft": ratio("cc", "sft"),
        "cc-nograd over sft": ratio("cc-nograd", "sft"),
        "floor": {name: floor[name] / floor["sft"] for name in ("cc", "cc-nograd")},
        "flops": floor,
    }


def format_result(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{name:<10} {seconds * 1000:8.1f} ms a step" for name, seconds in result["seconds"].items()]
    for name in ("stock over sft", "cc over sft", "cc-nograd over sft"):
        value = result[name]
        arm = name.split(" ")[0]
        floor = f"   floor {result['floor'][arm]:.3f}" if arm in result["floor"] else ""
        lines.append(f"{name:<20} {value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]{floor}")
    return "\n".join(lines)


def _config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


if __name__ == "__main__":
    cli.run(main)
