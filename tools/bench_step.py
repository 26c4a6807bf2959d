"""What a training step costs: stock Hugging Face SFT, our SFT, and CC-Tuning, interleaved in one run.

    python tools/bench_step.py                                                   # English 128, target 192 + 128 tokens
    python tools/bench_step.py --data rows.jsonl --tokenizer FOLDER              # the lengths of real rows
    torchrun --nproc_per_node 2 tools/bench_step.py --zero 3 --accumulation 8    # ranks, and the bytes they exchange
    python tools/bench_step.py --bf16 --hidden 2048 --layers 24                  # for a GPU

Arms, same model, rows and optimiser (torch's fused AdamW):
    stock      model(**padded batch).loss of each micro-batch, as a plain training loop does
    sft        ours: the trainer's own step, SFT
    cc         the trainer's own step, CC-Tuning, gradient through English
    cc-nograd  the same, english_grad false
Every round runs every arm once, in another order; a ratio is taken within its round. Figures are medians and, in
brackets, the middle half. Floors are counted FLOPs (cc_ds/plan/flops.py): SFT on real tokens with logits at labels
only; plus the English layers, forward or forward and backward, the last one's feed-forward block at the anchor only.
Peak memory is that of tensors made in a step (one of its own, at the end); weights and optimiser states are not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from cc_ds import CCConfig, CCModelForCausalLM, cli
from cc_ds.config import Config, DataConfig, ModelConfig, TrainConfig
from cc_ds.data.batches import BatchStream, CCCollator
from cc_ds.data.tokenise import load_tokenised
from cc_ds.dist.engine import build_engine, engine_config
from cc_ds.dist.group import Group, group_left_after, start_group
from cc_ds.eval.run import write_json
from cc_ds.models.attention import PACKED
from cc_ds.plan.flops import Lengths, step_flops
from cc_ds.plan.size import size_of
from cc_ds.trainer import Trainer

ARMS = ("stock", "sft", "cc", "cc-nograd")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="training rows, whose lengths the random rows get")
    parser.add_argument("--tokenizer", help="a folder or name; needed with --data")
    parser.add_argument("--chat_template", help="a built-in template; default: the tokenizer's own")
    parser.add_argument("--hidden", type=cli.positive, default=512)
    parser.add_argument("--layers", type=cli.positive, default=8)
    parser.add_argument("--vocab", type=cli.positive, default=8192)
    parser.add_argument("--batch", type=cli.positive, default=8, help="rows per micro-batch and rank (default 8)")
    parser.add_argument("--accumulation", type=cli.positive, default=1, help="micro-batches per step (default 1)")
    parser.add_argument("--max_tokens", type=int, default=0, help="max_tokens_per_micro_batch of our arms")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="ZeRO stage (default 0)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16, the optimiser in float32 (default: float32)")
    parser.add_argument("--rounds", type=cli.positive, default=9, help="after two that warm up (default 9)")
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--output", type=Path, help="json file for every figure")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run every arm in every round, print, and write json on request."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    group = start_group()
    rows = make_rows(args)
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: make_arm(name, args, rows, group, Path(folder)) for name in ARMS}
        times: dict[str, list[float]] = {name: [] for name in ARMS}
        for number in range(args.rounds + 2):
            for name in random.Random(number).sample(ARMS, len(ARMS)):
                wait(group)
                start = time.perf_counter()
                arms[name]()
                wait(group)
                if number >= 2:
                    times[name].append(time.perf_counter() - start)
        bytes_moved = {name: _bytes_moved(arms[name]) for name in ARMS} if group.world_size > 1 else {}
        peak = {name: _peak_bytes(arms[name]) for name in ARMS}
    result = summarise(times, floors(args, rows), args) | {"peak bytes": peak, "bytes moved": bytes_moved}
    if group.is_main:
        print(format_result(result))
        if args.output:
            write_json(result, args.output)


def wait(group: Group) -> None:
    """Until every rank has done its work, its GPU too."""
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    group.barrier()


def make_rows(args: argparse.Namespace) -> Dataset:
    """Random tokens in rows of the wanted lengths, as `load_tokenised` gives them.

    Raises:
        ValueError: --data without --tokenizer, or data that can't be read.
    """
    lengths = [Lengths(128, 192, 128)] * 256
    if args.data:
        if args.tokenizer is None:
            raise ValueError("--data needs --tokenizer, which says how many tokens a row has")
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        with tempfile.TemporaryDirectory() as cache:
            real, _ = load_tokenised(args.data, tokenizer, args.chat_template, max_length=4096, cache_dir=cache)
            lengths = [
                Lengths(len(row["english_input_ids"]), row["anchor"] + 1, len(row["input_ids"]) - row["anchor"] - 1)
                for row in real
            ]
    draw = torch.Generator().manual_seed(0)
    return Dataset.from_list([_row(each, args.vocab, draw) for each in lengths])


def _row(lengths: Lengths, vocab: int, draw: torch.Generator) -> dict[str, Any]:
    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocab, (count,), generator=draw).tolist()

    prompt, response = tokens(lengths.prompt), tokens(lengths.response)
    return {
        "input_ids": prompt + response,
        "labels": [-100] * len(prompt) + response,
        "anchor": len(prompt) - 1,
        "english_input_ids": tokens(lengths.english),
        "english_anchor": max(0, lengths.english - 1),
        "lang": "und",
        "source": "bench",
    }


def make_arm(name: str, args: argparse.Namespace, rows: Dataset, group: Group, folder: Path) -> Callable[[], None]:
    """One way to train a step, with its own copy of the same model and its own optimiser; each call is a step."""
    zero_file = folder / "zero.json"
    # As in a model of many layers, of which next to none stays gathered from forward to backward.
    zero = {"stage": args.zero, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    zero |= {"stage3_param_persistence_threshold": 10 * args.hidden}
    zero_file.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    config = Config(
        model=ModelConfig(model_name_or_path="none"),
        data=DataConfig(train_file=("none",)),
        cc=CCConfig(english_grad=name == "cc"),
        train=TrainConfig(
            output_dir=str(folder / name),
            method="cc" if name.startswith("cc") else "sft",
            deepspeed=str(zero_file),
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulation,
            max_tokens_per_micro_batch=args.max_tokens,
            bf16=args.bf16,
            max_steps=10**6,
            logging_steps=10**6,
        ),
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = CCModelForCausalLM.from_config(_model_config(args), cc_config=config.cc).to(dtype)
    if name == "stock":
        stock = AutoModelForCausalLM.from_config(_model_config(args)).to(dtype)
        stock.load_state_dict({k: v for k, v in model.state_dict().items() if "decision" not in k})
        return _stock_arm(stock.train(), config, rows, group)
    model.set_attn_implementation(PACKED)
    if name == "sft":
        model.decision_maker.requires_grad_(False)
    engine = build_engine(model.train(), engine_config(config.train, args.hidden), config.train, 10**6, group)
    trainer = Trainer(engine, group, config, rows, None, 0, run=None, requests=None)
    return trainer.train_step


def _stock_arm(model, config: Config, rows: Dataset, group: Group) -> Callable[[], None]:
    """What a plain loop over padded micro-batches does; the engine is there for ZeRO and for float32 beside bf16."""
    train, collate = config.train, CCCollator(0, connect=False)
    per_rank = train.per_device_train_batch_size * train.gradient_accumulation_steps
    stream = BatchStream(rows, per_rank * group.world_size, seed=train.seed)
    with_engine = group.world_size > 1 or train.bf16
    if with_engine:
        engine = build_engine(model, engine_config(train, model.config.hidden_size), train, 10**6, group)
    else:
        model.to(group.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        mine = next(stream)[group.rank * per_rank : (group.rank + 1) * per_rank]
        for start in range(0, per_rank, train.per_device_train_batch_size):
            padded = collate(mine[start : start + train.per_device_train_batch_size])
            inputs = {key: padded[key].to(group.device) for key in ("input_ids", "attention_mask", "labels")}
            if with_engine:
                engine.backward(engine(**inputs).loss)
                engine.step()
            else:
                (model(**inputs).loss / train.gradient_accumulation_steps).backward()
        if not with_engine:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return step


def _bytes_moved(step: Callable[[], None]) -> dict[str, int]:
    """Bytes by collective that this rank takes part in, in one step."""
    import deepspeed.comm

    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, prof_ops=[], debug=False)
    logger = deepspeed.comm.comm.comms_logger
    logger.comms_dict.clear()
    step()
    deepspeed.comm.configure(enabled=False)
    return {
        operation: sum(size * int(counts[0]) for size, counts in sizes.items())
        for operation, sizes in logger.comms_dict.items()
    }


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at a time of tensors that are made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.known = weakref.WeakSet()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self.known.add(tensor.untyped_storage())  # what was there before does not count
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, size: int) -> None:
        self.alive -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _peak_bytes(step: Callable[[], None]) -> int:
    with PeakBytes() as mode:
        step()
    return mode.peak


def floors(args: argparse.Namespace, rows: Dataset) -> dict[str, float]:
    """FLOPs that an arm cannot do without, for all rows."""
    lengths = [
        Lengths(len(row["english_input_ids"]), row["anchor"] + 1, len(row["input_ids"]) - row["anchor"] - 1)
        for row in rows
    ]
    with torch.device("meta"):
        model = CCModelForCausalLM.from_config(_model_config(args))
    return step_flops(size_of(model), lengths)


def summarise(times: dict[str, list[float]], floor: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Medians, ratios within rounds, and ratios of floors."""

    def ratio(arm: str, to: str) -> dict[str, float]:
        values = [mine / other for mine, other in zip(times[arm], times[to], strict=True)]
        low, middle, high = statistics.quantiles(values, n=4)
        return {"median": middle, "low": low, "high": high}

    pairs = (("stock", "sft"), ("cc", "sft"), ("cc-nograd", "sft"), ("cc", "stock"), ("cc-nograd", "stock"))
    return {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        **{f"{arm} over {to}": ratio(arm, to) for arm, to in pairs},
        "floor": {name: floor[name] / floor["sft"] for name in ("cc", "cc-nograd")},
        "flops": floor,
    }


def format_result(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{name:<10} {seconds * 1000:8.1f} ms a step   peak {result['peak bytes'][name] / 2**20:8.1f} MiB"
        for name, seconds in result["seconds"].items()
    ]
    for name, value in result.items():
        if " over " in name:
            arm, _, to = name.split(" ")
            floor = f"   floor {result['floor'][arm]:.3f}" if arm in result["floor"] and to == "sft" else ""
            lines.append(f"{name:<20} {value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]{floor}")
    for name, moved in result["bytes moved"].items():
        said = "  ".join(f"{operation} {count / 1e6:.1f} MB" for operation, count in sorted(moved.items()))
        lines.append(f"{name:<10} {said}")
    return "\n".join(lines)


def _model_config(args: argparse.Namespace) -> LlamaConfig:
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
    with group_left_after():
        cli.run(main)
