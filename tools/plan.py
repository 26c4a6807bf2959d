"""What a run needs, before there are machines for it: memory, communication, FLOPs and time of a step.

    python tools/plan.py --model models/Llama-3.1-70B-Instruct --nodes 8 --gpus-per-node 8 --gpu h100 \\
        --deepspeed ds_configs/zero3.json --micro-batch 4 --accumulation 2 --gradient-checkpointing

Only the model's config.json is read; nothing is downloaded but that, and no GPU is needed. What is assumed, and what
was checked by measurement, stands in docs/planning.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from cc_ds import cli
from cc_ds.config import TrainConfig
from cc_ds.dist.engine import engine_config
from cc_ds.eval.run import write_json
from cc_ds.plan.estimate import Cluster, Workload, cheaper_memory, estimate
from cc_ds.plan.flops import METHODS, Lengths
from cc_ds.plan.gpus import GPUS
from cc_ds.plan.report import format_changes, format_estimates
from cc_ds.plan.size import meta_model, read_config, size_of


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a config.json, or a name on the Hugging Face hub")
    parser.add_argument("--nodes", type=cli.positive, default=1)
    parser.add_argument("--gpus-per-node", type=cli.positive, default=8)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json", help="DeepSpeed configuration")
    parser.add_argument(
        "--micro-batch", type=cli.positive, default=1, help="rows per GPU (per tensor group) and micro-batch"
    )
    parser.add_argument("--accumulation", type=cli.positive, default=1, help="micro-batches per step")
    parser.add_argument(
        "--english-tokens", type=cli.positive, default=256, help="of a row's English prompt (default 256)"
    )
    parser.add_argument("--prompt-tokens", type=cli.positive, default=384, help="of its prompt (default 384)")
    parser.add_argument("--response-tokens", type=cli.positive, default=256, help="of its response (default 256)")
    parser.add_argument("--tensor-parallel", type=cli.positive, default=1)
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="adapters of this rank on the layers; 0: everything is trained"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--efficiency", type=float, default=0.5, help="FLOP/s of the kernels over the GPU's peak (default 0.5)"
    )
    parser.add_argument("--json", type=Path, help="file for every figure")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Estimate each method, print, and write json on request."""
    args = parse(argv)
    if not 0 < args.efficiency <= 1 or args.lora_rank < 0:
        raise ValueError("--efficiency lies between 0 and 1, --lora-rank is 0 or more")
    config = read_config(args.model)
    train = TrainConfig(
        output_dir="",
        deepspeed=args.deepspeed,
        offload_dir="",  # where on the disk makes no difference
        bf16=True,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.accumulation,
    )
    ds_config = engine_config(train, config.hidden_size)
    cluster = Cluster(
        nodes=args.nodes, gpus_per_node=args.gpus_per_node, gpu=GPUS[args.gpu], efficiency=args.efficiency
    )
    work = Workload(
        row=Lengths(args.english_tokens, args.prompt_tokens, args.response_tokens),
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        tensor_parallel=args.tensor_parallel,
        lora_rank=args.lora_rank,
        checkpointing=args.gradient_checkpointing,
    )
    found = {method: estimate(config, cluster, work, ds_config, method) for method in METHODS}
    size = size_of(meta_model(config, lora_rank=args.lora_rank))
    print(f"{args.model}: {size.numel() / 1e9:.2f}B parameters, {size.numel(trainable=True) / 1e9:.3f}B trained")
    print(format_estimates(found, cluster))
    for method in METHODS:
        if not found[method].fits:
            print(format_changes(method, cheaper_memory(config, cluster, work, ds_config, method)))
    if args.json:
        write_json(
            {"settings": {k: str(v) for k, v in vars(args).items()}} | {k: asdict(v) for k, v in found.items()},
            args.json,
        )


if __name__ == "__main__":
    cli.run(main)
