"""What connected generation costs beside the stock model's own generate, on the same prompts, interleaved.

    python tools/bench_generate.py --batch 1 8

Time: every round runs both once, in another order; a ratio is taken within its round; medians, and in brackets the
middle half. Memory: the most that tensors held at once above what stood before, by torch's profiler on the CPU and by
the allocator on CUDA.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from cc_ds import CCModelForCausalLM, cli
from cc_ds.dist.group import choose_accelerator
from cc_ds.eval.run import write_json


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=cli.positive, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_tokens", type=cli.positive, default=512)
    parser.add_argument("--new_tokens", type=cli.positive, default=40)
    parser.add_argument("--hidden", type=cli.positive, default=512)
    parser.add_argument("--layers", type=cli.positive, default=8)
    parser.add_argument("--vocab", type=cli.positive, default=8192)
    parser.add_argument("--rounds", type=cli.positive, default=15, help="after one that warms up (default 15)")
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--device", default="cuda" if choose_accelerator() else "cpu")
    parser.add_argument("--output", type=Path, help="json file for every figure")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure each batch size, print, and write json on request."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    model = make_model(args)
    results = {}
    for batch in args.batch:
        results[f"batch {batch}"] = result = measure(model, batch, args)
        low, middle, high = result["time ratio"]
        print(
            f"batch {batch}: plain {result['plain ms']:.1f} ms, connected {result['connected ms']:.1f} ms, "
            f"ratio {middle:.3f} [{low:.3f}, {high:.3f}], memory ratio {result['memory ratio']:.3f}"
        )
    if args.output:
        write_json({"settings": {key: str(value) for key, value in vars(args).items()}, **results}, args.output)


def make_model(args: argparse.Namespace) -> CCModelForCausalLM:
    """A random Llama of the asked size with a random Transform Matrix (H, H), in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = CCModelForCausalLM.from_config(config).to(args.device).eval()
    model.set_transform(torch.randn(args.hidden, args.hidden) / args.hidden**0.5)
    return model


def measure(model: CCModelForCausalLM, batch: int, args: argparse.Namespace) -> dict:
    """Milliseconds and peak bytes of plain and connected generation in turns; quartiles of their ratios."""
    prompts = torch.randint(1, args.vocab, (batch, args.prompt_tokens), device=args.device)

    def generate(connect: bool) -> float:
        start = time.perf_counter()
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, connect=connect, max_new_tokens=args.new_tokens, do_sample=False)
        if prompts.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(args.rounds + 1):
        for connect in random.Random(number).sample((False, True), 2):
            seconds = generate(connect)
            if number:
                times[connect].append(seconds)
    memory = {connect: peak_bytes(lambda connect=connect: generate(connect), prompts.is_cuda) for connect in times}
    ratios = [ours / plain for ours, plain in zip(times[True], times[False], strict=True)]
    return {
        "plain ms": 1000 * statistics.median(times[False]),
        "connected ms": 1000 * statistics.median(times[True]),
        "time ratio": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3,
        "plain bytes": memory[False],
        "connected bytes": memory[True],
        "memory ratio": memory[True] / memory[False],
    }


def peak_bytes(work, on_cuda: bool) -> int:
    """The most bytes that tensors made by `work` held at once."""
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    cli.run(main)
