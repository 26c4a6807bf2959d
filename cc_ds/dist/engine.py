"""The DeepSpeed engine: its configuration from ours, the optimiser, the schedule."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from cc_ds.config import TrainConfig
from cc_ds.dist.group import Group
from cc_ds.dist.zero import is_split
from cc_ds.export import CONNECTION_TENSORS


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that takes no step when a gradient is NaN or Inf, as ZeRO does by itself; for stage 0.

    DeepSpeed reads `overflow` after the step and leaves the schedule where it was.
    """

    overflow = False

    def __init__(self, *args, ranks: Group, **kwargs) -> None:
        """`ranks`: the process group; its tensor groups must decide as one."""
        super().__init__(*args, **kwargs)
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None):
        """A step, or none where a gradient on any rank of the group is not finite; `overflow` says which."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.overflow = not bool(_norm_of_gradients(parameters, self.ranks).isfinite())
        return None if self.overflow else super().step(closure)


_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def engine_config(train: TrainConfig, hidden_size: int) -> dict[str, Any]:
    """A DeepSpeed configuration: the user's file with every "auto" filled in, and what must be written out.

    Raises:
        ValueError: a file that can't be read, or a value in it that contradicts ours.
    """
    config = _read(train.deepspeed) if train.deepspeed else {}
    for section in ("optimizer", "scheduler", "fp16"):
        if config.get(section, {}) and config[section].get("enabled", True):
            raise ValueError(
                f"{train.deepspeed}: remove the {section!r} section; the optimiser (AdamW), the schedule and the "
                f"precision (bf16 or float32) are set by learning_rate, lr_scheduler_type, bf16 and their neighbours"
            )
    ours = {
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": float(train.max_grad_norm),  # unset, DeepSpeed clips at 1.0
    }
    if config.pop("train_batch_size", "auto") != "auto":
        raise ValueError(f'{train.deepspeed}: leave train_batch_size out or set it to "auto"')
    for key, value in ours.items():
        _fill(config, key, value, train.deepspeed)
    _fill(config.setdefault("bf16", {}), "enabled", train.bf16, train.deepspeed)
    if train.tensor_parallel_size > 1 or "tensor_parallel" in config:
        tensor_parallel = config.setdefault("tensor_parallel", {})
        _fill(tensor_parallel, "autotp_size", train.tensor_parallel_size, train.deepspeed)
        # Our loss takes whole logits. Unset, DeepSpeed splits those of a head that is tied to the embeddings.
        _fill(tensor_parallel, "vocab_parallel_lm_head", False, train.deepspeed)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero.get("zero_quantized_gradients"):
        raise ValueError(
            f"{train.deepspeed}: remove zero_quantized_gradients; on two or more nodes DeepSpeed 0.19.8 gives "
            f"gradients of bf16 or float32 to a kernel that takes them for fp16, and the run would train on garbage"
        )
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero |= {key: value for key, value in sizes.items() if zero.get(key) == "auto"}
    _fill_offload_folder(zero, train)
    if train.bf16 and zero.get("stage", 0) == 0:
        # bf16 at stage 0 is off by 1.2e-2 after a few steps (DeepSpeed 0.19.8 takes a dummy Adam step at the start);
        # stage 1 keeps the same weights on every rank and agrees with a float32-master reference within 7e-4.
        zero["stage"] = 1
    # From ZeRO 2 on, step() ends the accumulation. Left to the last backward, which is the English one, an offloaded
    # optimiser would get no gradient of what that does not reach, the LM head for one.
    config["managed_gradient_accumulation"] = zero.get("stage", 0) < 2
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW also where the optimiser is offloaded
    config.setdefault("steps_per_print", 2**31)
    return config


def _fill_offload_folder(zero: dict[str, Any], train: TrainConfig) -> None:
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name, {})
        if section.get("device") == "nvme" and section.get("nvme_path", "auto") == "auto":
            if train.offload_dir is None:
                raise ValueError(
                    f"{train.deepspeed}: {name} goes to NVMe; give --offload_dir a folder on a disk of the node itself"
                )
            section["nvme_path"] = train.offload_dir


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return config["zero_optimization"].get("stage", 0)


def check_tensor_parallel(model_class: type, hf_config: PretrainedConfig, config: dict[str, Any]) -> None:
    """Whether DeepSpeed can split this model over the tensor-parallel ranks of `config`.

    Raises:
        ValueError: heads that can't be dealt evenly, or a family that DeepSpeed 0.19.8 can't split: it follows the plan
            that transformers has for the family, whole or not at all.
    """
    from deepspeed.module_inject.tp_plan_converter import SUPPORTED_STYLES

    size = config["tensor_parallel"]["autotp_size"]
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(hf_config, name, None)
        if heads is not None and heads % size:
            raise ValueError(f"tensor_parallel_size {size} does not divide the model's {name}, {heads}")
    if "partition_config" in config["tensor_parallel"]:
        return
    plan = {**(hf_config.base_model_tp_plan or {}), **(model_class._tp_plan or {})}
    unknown = sorted(set(plan.values()) - SUPPORTED_STYLES)
    if unknown or not plan:
        raise ValueError(
            f"DeepSpeed can't split a {hf_config.model_type} over tensor-parallel ranks (transformers' plan for it has "
            f"{', '.join(unknown) or 'no entries'}); use ZeRO-3 alone, or describe the split as tensor_parallel."
            f"partition_config in the file of --deepspeed"
        )


def sharded_construction(config: dict[str, Any]) -> HfDeepSpeedConfig:
    """While the returned object lives, `from_pretrained` builds its model sharded if the stage is 3.

    Over all ranks, tensor groups too: the engine then gathers one weight after another and keeps its slice.
    """
    # transformers renames no keys of a checkpoint where it sees tensor parallelism, whose part begins only afterwards.
    return HfDeepSpeedConfig({key: value for key, value in config.items() if key != "tensor_parallel"})


def build_engine(model: nn.Module, config: dict[str, Any], train: TrainConfig, total_steps: int, group: Group):
    """The engine over `model`, with AdamW and the schedule of `train` over `total_steps` steps."""
    import deepspeed

    from cc_ds.dist.writer import CheckpointWriter

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    adamw = functools.partial(SkippingAdamW, ranks=group) if zero_stage(config) == 0 else torch.optim.AdamW
    optimizer = adamw(
        parameter_groups(model, train),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,  # one kernel per step on CUDA; on a CPU a quarter of the time of torch's loop
    )
    schedule = get_scheduler(
        _SCHEDULES[train.lr_scheduler_type],
        optimizer,
        num_warmup_steps=train.warmup(total_steps),
        num_training_steps=total_steps,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    if group.tensor_size > 1:
        engine.first_dataloader_check.remove()  # it can't compare packed batches; ours are equal by construction
    engine.checkpoint_engine = CheckpointWriter()
    engine._copy_recovery_script = lambda folder: None  # tools/export.py does that; a full disk would raise in it
    return engine


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """The optimiser's groups: weights, norms and biases, and the connection where it has a learning rate of its own."""
    rate = train.connection_learning_rate
    weights: dict[str, Any] = {"params": [], "weight_decay": train.weight_decay}
    norms: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    connection: dict[str, Any] = {"params": [], "weight_decay": train.weight_decay, "lr": rate}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            apart = rate is not None and name in CONNECTION_TENSORS
            group = connection if apart else norms if _is_norm_or_bias(name, parameter) else weights
            group["params"].append(parameter)
    return [group for group in (weights, norms, connection) if group["params"]]  # LoRA trains no norm


@contextmanager
def settings_kept(engine) -> Iterator[None]:
    """What is loaded meanwhile leaves the optimiser's settings and the schedule as this run has them.

    A checkpoint holds those of the run that wrote it; and a universal one at stage 3 (DeepSpeed 0.19.8) gives every
    group those of the first: norms and biases its weight decay, the connection its learning rate.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    schedule = engine.lr_scheduler
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    schedule.base_lrs = [group["initial_lr"] for group in settings]
    rates = [rate * factor(schedule.last_epoch) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    schedule._last_lr = rates
    for group, kept, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(kept | {"lr": rate})


def begin_backward(engine, last: bool, after_forward: bool = True) -> None:
    """Before each backward of a step.

    Args:
        last: of the step. Below ZeRO 2 the ranks reduce their gradients in it.
        after_forward: whether a forward stands between this backward and the one before. ZeRO takes a backward without
            one for a later phase of the one before, and at stage 3 (DeepSpeed 0.19.8) replaces the gradients which that
            one left, rather than adding to them.
    """
    if engine.managed_gradient_accumulation():
        engine.set_gradient_accumulation_boundary(last)
    if not after_forward and hasattr(engine.optimizer, "clear_backward_seen_flag"):  # of a ZeRO optimiser
        engine.optimizer.clear_backward_seen_flag()


def grad_norm(engine, group: Group) -> float | torch.Tensor:
    """The norm of all gradients before clipping; read it between backward and step.

    ZeRO computes it inside its step, where it is read afterwards; at stage 0 in float32 DeepSpeed keeps none.
    """
    if engine.zero_optimization_stage() == 0:
        return _norm_of_gradients(engine.module.parameters(), group)
    return engine.get_global_grad_norm()


@torch.no_grad()
def _norm_of_gradients(parameters: Iterable[nn.Parameter], group: Group) -> torch.Tensor:
    """Over all slices of split weights; what every rank of a tensor group holds whole counts once."""
    counts = [p for p in parameters if p.grad is not None and (group.tensor_rank == 0 or is_split(p))]
    norm = torch.nn.utils.get_total_norm([p.grad for p in counts])
    return norm if group.tensor_size == 1 else group.tensor_sum(norm.square()).sqrt()


def _is_norm_or_bias(name: str, parameter: nn.Parameter) -> bool:
    # ZeRO-3 leaves an empty 1-D tensor in place of a partitioned weight: its shape is in ds_shape.
    return name.endswith("bias") or len(getattr(parameter, "ds_shape", parameter.shape)) < 2


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); give --deepspeed an existing file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return config


def _fill(section: dict[str, Any], key: str, value: Any, path: str | None) -> None:
    if section.get(key, "auto") not in ("auto", value):
        raise ValueError(f'{path}: {key} is {section[key]!r}, but this run has {value!r}; write "auto" there')
    section[key] = value
