"""One step of SFT and of CC-Tuning on a cluster: memory of a GPU by part, bytes moved, FLOPs, seconds.

bf16 weights with float32 master weights, as `bf16: true` trains. What each figure assumes is in docs/planning.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from cc_ds.dist.engine import zero_stage
from cc_ds.plan.flops import Lengths, step_flops
from cc_ds.plan.gathers import Traffic, step_traffic
from cc_ds.plan.gpus import Gpu
from cc_ds.plan.memory import StepMemory, step_memory
from cc_ds.plan.size import ModelSize, meta_model, size_of

BF16 = 2
ADAM = 12  # float32 master weight and two moments
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragmentation


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The machines and how well they are used."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    efficiency: float = 0.5
    """FLOP/s that the kernels reach, over the peak."""
    link_efficiency: float = 0.8
    """Bytes per second that collectives reach, over the link's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What every step does."""

    row: Lengths
    micro_batch: int
    accumulation: int
    tensor_parallel: int = 1
    lora_rank: int = 0
    checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """One step of one method."""

    memory: dict[str, float]
    """GiB of a GPU by part, and `peak`, which is less than their sum: not all parts are there at a time."""
    host_memory: float
    """GiB of a node's RAM or NVMe that offloading takes."""
    moved: dict[str, float]
    """Bytes by collective, as they stand in each GPU's buffers, per step."""
    flops: float
    """Of one GPU, recomputation included."""
    seconds: dict[str, float]
    """By part, and `step`: late + tensor parallel + max(compute, overlapped) + optimiser."""
    tokens_per_second: float
    """Target tokens, prompt and response, of the whole cluster."""
    mfu: float
    """FLOPs without recomputation over what the GPUs could do in the step's time."""
    fits: bool


def estimate(
    config: PretrainedConfig, cluster: Cluster, work: Workload, ds_config: dict[str, Any], method: str
) -> Estimate:
    """One step of `method` (sft, cc, cc-nograd).

    Args:
        ds_config: a DeepSpeed configuration without "auto" (`dist.engine.engine_config`).

    Raises:
        ValueError: a tensor-parallel size that does not divide the GPUs or the model.
    """
    gpus = cluster.nodes * cluster.gpus_per_node
    if cluster.gpus_per_node % work.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel {work.tensor_parallel} does not divide the {cluster.gpus_per_node} GPUs of a node"
        )
    replicas = gpus // work.tensor_parallel
    local = local_config(config, work.tensor_parallel)
    size = size_of(meta_model(local, lora_rank=work.lora_rank))
    rows = [work.row] * work.micro_batch
    traffic = _traffic(size, method, work, ds_config)
    activations = step_memory(
        local, method, rows, work.accumulation, checkpointing=work.checkpointing, lora_rank=work.lora_rank,
        # below stage 2, gradients are counted whole in any case
    )  # fmt: skip
    memory, host = _memory(size, traffic, activations, replicas, ds_config)
    host *= cluster.gpus_per_node
    whole = size_of(meta_model(config, lora_rank=work.lora_rank))
    useful, done = (step_flops(whole, rows, again)[method] * work.accumulation for again in (False, work.checkpointing))
    moved = _moved(size, traffic, work, method, ds_config)
    seconds = _seconds(size, traffic, moved, done / work.tensor_parallel, cluster, work, ds_config)
    step = seconds["step"]
    tokens = work.row.target * work.micro_batch * work.accumulation * replicas
    return Estimate(
        memory=memory,
        host_memory=host,
        moved=moved,
        flops=done / work.tensor_parallel,
        seconds=seconds,
        tokens_per_second=tokens / step,
        mfu=useful / work.tensor_parallel / (step * cluster.gpu.bf16),
        fits=memory["peak"] <= USABLE * cluster.gpu.memory,
    )


def local_config(config: PretrainedConfig, tensor_parallel: int) -> PretrainedConfig:
    """The model as one tensor rank computes it: a slice of the heads and of the feed-forward block, the rest whole.

    Raises:
        ValueError: heads or feed-forward width that the size does not divide.
    """
    if tensor_parallel == 1:
        return config
    local = copy.deepcopy(config)
    local.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        width = getattr(config, name, None)
        if width is None:
            continue
        if width % tensor_parallel:
            raise ValueError(f"--tensor-parallel {tensor_parallel} does not divide the model's {name}, {width}")
        setattr(local, name, width // tensor_parallel)
    return local


def cheaper_memory(
    config: PretrainedConfig, cluster: Cluster, work: Workload, ds_config: dict[str, Any], method: str
) -> list[tuple[str, Estimate]]:
    """Changes that make a step fit, the fastest first; by tokens per second and GPU."""
    zero = ds_config["zero_optimization"]
    offload = ds_config | {"zero_optimization": zero | {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    three = ds_config | {"zero_optimization": zero | {"stage": 3}}
    thrifty = replace(work, checkpointing=True)
    single = replace(thrifty, micro_batch=1, accumulation=work.accumulation * work.micro_batch)
    joined = replace(thrifty, micro_batch=1, accumulation=1)
    base = "gradient checkpointing, ZeRO-3"
    options = [
        ("ZeRO-3", cluster, work, three),
        (base, cluster, thrifty, three),
        (f"{base}, micro-batches of 1 row", cluster, single, three),
        (f"{base}, one micro-batch of 1 row", cluster, joined, three),
        (f"{base}, two micro-batches of 1 row", cluster, replace(joined, accumulation=2), three),
        (f"{base}, 1 row, optimiser offloaded to the CPU (its transfers not counted)", cluster, single, offload),
        (f"{base}, twice the nodes", replace(cluster, nodes=2 * cluster.nodes), thrifty, three),
        (f"{base}, LoRA of rank 16", cluster, replace(thrifty, lora_rank=16), three),
    ]
    for ways in (2, 4, 8):
        if ways % work.tensor_parallel == 0 and ways > work.tensor_parallel and cluster.gpus_per_node % ways == 0:
            joint = replace(thrifty, tensor_parallel=ways, micro_batch=work.micro_batch * ways // work.tensor_parallel)
            options.append((f"{base}, tensor parallel {ways}, as many rows a step", cluster, joint, three))
    found = []
    for name, machines, changed, ds in options:
        try:
            result = estimate(config, machines, changed, ds, method)
        except ValueError:  # a way to split that this model does not have, or no peft
            continue
        if result.fits:
            gpus = machines.nodes * machines.gpus_per_node
            found.append((result.tokens_per_second / gpus, name, result))
    return [(name, result) for _, name, result in sorted(found, key=lambda item: -item[0])]


def _traffic(size: ModelSize, method: str, work: Workload, ds_config: dict[str, Any]) -> Traffic:
    zero, stage = ds_config["zero_optimization"], zero_stage(ds_config)
    if stage == 3:
        return step_traffic(size, method, work.accumulation, zero, work.checkpointing)
    trained = size.numel(trainable=True)
    backwards = work.accumulation + (method == "cc") if stage == 2 else 1
    return Traffic(trained if stage else 0, trained if stage else 0, trained * backwards, 0)


def _memory(
    size: ModelSize, traffic: Traffic, step: StepMemory, replicas: int, ds_config: dict[str, Any]
) -> tuple[dict[str, float], float]:
    """GiB of a GPU by part, and of RAM or NVMe per GPU."""
    zero, stage = ds_config["zero_optimization"], zero_stage(ds_config)
    weights, trained = size.numel(), size.numel(trainable=True)
    shard = {name: replicas if stage >= least else 1 for name, least in (("weights", 3), ("grads", 2), ("adam", 1))}
    bucket = min(zero.get("reduce_bucket_size", 500_000_000), trained) if stage >= 2 else 0
    optimiser = ADAM * trained / shard["adam"]
    parameters = BF16 * weights / shard["weights"]
    host = 0.0
    if zero.get("offload_param", {}).get("device", "none") != "none":
        host, parameters = host + parameters, 0.0
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        host, optimiser = host + optimiser, 0.0
    # the step in float32, one group of parameters at a time: its gradient (AdamW is fused)
    update = 4 * min(trained / shard["adam"], zero.get("sub_group_size", 1_000_000_000)) if optimiser else 0.0
    parts = {
        "parameters": parameters,
        "gradients": BF16 * trained / shard["grads"],
        "optimiser": optimiser,
        "gathered parameters": BF16 * traffic.peak,
        "buckets": 2 * BF16 * bucket,  # and the copy that is interleaved for the ranks
        "English activations": step.english,
        "target activations": step.activations,
        "logits, loss": step.logits,
        "backward": max(step.working, 0.0),
    }
    rest = parts["parameters"] + parts["gradients"] + parts["optimiser"] + parts["buckets"]
    parts["optimiser step"] = update
    parts["peak"] = rest + max(parts["gathered parameters"] + step.peak, update)
    return {name: value / 2**30 for name, value in parts.items()}, host / 2**30


def _moved(
    size: ModelSize, traffic: Traffic, work: Workload, method: str, ds_config: dict[str, Any]
) -> dict[str, float]:
    reduce = "reduce-scatter" if zero_stage(ds_config) == 3 else "all-reduce of gradients"
    tokens = work.row.target * (5 if work.checkpointing else 4)  # o_proj and down_proj, forward and backward
    if method != "sft":
        english = {"cc": 5 if work.checkpointing else 4, "cc-nograd": 2}[method]
        tokens += work.row.english * english
    tokens *= work.micro_batch * work.accumulation
    tensor = BF16 * tokens * size.hidden_size * len(size.layers) if work.tensor_parallel > 1 else 0.0
    return {
        "all-gather": float(BF16 * traffic.gathered),
        reduce: float(BF16 * traffic.reduced),
        "tensor-parallel all-reduce": float(tensor),
    }


def _seconds(
    size: ModelSize, traffic: Traffic, moved: dict[str, float], flops: float, cluster: Cluster, work: Workload,
    ds_config: dict[str, Any],
) -> dict[str, float]:  # fmt: skip
    gpu, ranks = cluster.gpu, cluster.nodes * cluster.gpus_per_node // work.tensor_parallel
    # A ring over all GPUs enters and leaves each node once, over all its network cards together, which tensor groups,
    # each with a ring of its own, share.
    network = gpu.network * cluster.gpus_per_node / 8 / work.tensor_parallel
    link = cluster.link_efficiency * (min(gpu.nvlink, network) if cluster.nodes > 1 else gpu.nvlink)
    ring = (ranks - 1) / ranks / link
    tp = work.tensor_parallel
    all_reduce = 2 * (tp - 1) / tp / (cluster.link_efficiency * gpu.nvlink)
    reduced = sum(value for name, value in moved.items() if name in ("reduce-scatter", "all-reduce of gradients"))
    reduced *= 2 if "all-reduce of gradients" in moved else 1
    overlaps = ds_config["zero_optimization"].get("overlap_comm") is not False
    late = BF16 * traffic.gathered_late * ring + (0 if overlaps else reduced * ring)
    ahead = BF16 * (traffic.gathered - traffic.gathered_late) * ring + (reduced * ring if overlaps else 0)
    trained = size.numel(trainable=True) / (ranks if zero_stage(ds_config) else 1)
    seconds = {
        "compute": flops / (gpu.bf16 * cluster.efficiency),
        "late": late,
        "overlapped": ahead,
        "tensor parallel": moved["tensor-parallel all-reduce"] * all_reduce,
        "optimiser": 30 * trained / gpu.hbm,  # 14 bytes of state and gradient read, 14 written, the bf16 weight
    }
    step = late + seconds["tensor parallel"] + max(seconds["compute"], ahead) + seconds["optimiser"]
    return seconds | {"step": step}
